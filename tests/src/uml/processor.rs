// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The effect of this host's processor on User-Mode Linux.
//!
//! The kernel keeps the XSAVE state of its processes and makes the host restore it with PTRACE_SETREGSET, which requires exactly the size
//! of this processor (EFAULT otherwise). Up to Linux 6.12 the room is fixed, and AMX exceeds it (Sapphire Rapids and later).

/// Bytes of state that the source has room for. A smaller state is restored without an error.
const ROOM: u32 = 2696;

/// The line in [`SOURCE`] that defines it.
const LINE: &str = "DEFINE_LONGS(HOST_FP_SIZE, 2696);";

/// The file of the kernel's source with the definition.
pub const SOURCE: &str = "arch/x86/um/user-offsets.c";

/// A size of XSAVE state that the unmodified source has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LargeState(u32);

impl LargeState {
    /// Creates the state of this host's processor, if it is large: CPUID leaf 0xD.
    pub fn of_host() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let state = raw_cpuid::CpuId::new().get_extended_state_info()?;
            Self::new(state.xsave_area_size_enabled_features())
        }
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// Creates a state of `size` bytes, if it is large.
    fn new(size: u32) -> Option<Self> {
        (size > ROOM).then_some(Self(size))
    }

    /// Returns the suffix of the name of a kernel with room for it.
    pub fn suffix(self) -> String {
        format!("-xsave{}", self.0)
    }

    /// Returns the option that enlarges the kernel's stack: the state is on it while a signal is handled.
    pub fn option(self) -> &'static str {
        "CONFIG_KERNEL_STACK_ORDER=4\n"
    }

    /// Returns [`SOURCE`] with room for the state; `None` if it is not the known version.
    pub fn patch(self, source: &str) -> Option<String> {
        let size = format!("DEFINE_LONGS(HOST_FP_SIZE, {});", self.0);
        source
            .contains(LINE)
            .then(|| source.replacen(LINE, &size, 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFSETS: &str = "#ifdef FP_XSTATE_MAGIC1\n\tDEFINE_LONGS(HOST_FP_SIZE, 2696);\n#else\n";

    #[test]
    fn a_state_that_the_source_has_room_for_changes_nothing() {
        // No AVX-512; AVX-512 on AMD; AVX-512 with protection keys on Intel.
        for size in [832, 2432, 2696] {
            assert_eq!(LargeState::new(size), None);
        }
    }

    #[test]
    fn amx_gets_room_in_the_source_and_on_the_stack() {
        let state = LargeState::new(11008).unwrap();
        assert_eq!(
            state.patch(OFFSETS).unwrap(),
            "#ifdef FP_XSTATE_MAGIC1\n\tDEFINE_LONGS(HOST_FP_SIZE, 11008);\n#else\n"
        );
        assert_eq!(state.option(), "CONFIG_KERNEL_STACK_ORDER=4\n");
        assert_eq!(state.suffix(), "-xsave11008");
    }

    #[test]
    fn a_source_without_the_line_is_noticed() {
        let state = LargeState::new(11008).unwrap();
        assert_eq!(state.patch("#endif\n"), None);
    }
}
