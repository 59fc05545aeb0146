// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands that a guest may send to a SCSI device of the host: those for its data, and those that examine it. Others could change its
//! firmware or destroy it. The kernel has a similar list for users without privileges.

/// Commands that change nothing that survives.
const READS: &[u8] = &[
    0x00, // TEST UNIT READY
    0x03, // REQUEST SENSE
    0x05, // READ BLOCK LIMITS
    0x08, // READ(6)
    0x0b, // SEEK(6)
    0x12, // INQUIRY
    0x1a, // MODE SENSE(6)
    0x1b, // START STOP UNIT
    0x1e, // PREVENT ALLOW MEDIUM REMOVAL
    0x23, // READ FORMAT CAPACITIES
    0x25, // READ CAPACITY(10)
    0x28, // READ(10)
    0x2b, // SEEK(10)
    0x2f, // VERIFY(10)
    0x34, // PRE-FETCH(10), READ POSITION
    0x37, // READ DEFECT DATA(10)
    0x3c, // READ BUFFER
    0x43, // READ TOC/PMA/ATIP
    0x44, // REPORT DENSITY SUPPORT
    0x45, // PLAY AUDIO(10)
    0x46, // GET CONFIGURATION
    0x47, // PLAY AUDIO MSF
    0x4a, // GET EVENT STATUS NOTIFICATION
    0x4b, // PAUSE/RESUME
    0x4d, // LOG SENSE
    0x4e, // STOP PLAY/SCAN
    0x51, // READ DISC INFORMATION
    0x52, // READ TRACK INFORMATION
    0x5a, // MODE SENSE(10)
    0x5c, // READ BUFFER CAPACITY
    0x5e, // PERSISTENT RESERVE IN
    0x88, // READ(16)
    0x8f, // VERIFY(16)
    0x90, // PRE-FETCH(16)
    0x9e, // SERVICE ACTION IN(16)
    0xa0, // REPORT LUNS
    0xa3, // MAINTENANCE IN
    0xa4, // REPORT KEY
    0xa8, // READ(12)
    0xac, // GET PERFORMANCE
    0xad, // READ DISC STRUCTURE
    0xaf, // VERIFY(12)
    0xb7, // READ DEFECT DATA(12)
    0xb9, // READ CD MSF
    0xbb, // SET CD SPEED
    0xbd, // MECHANISM STATUS
    0xbe, // READ CD
];

/// Commands that also need a device that may be written.
const WRITES: &[u8] = &[
    0x0a, // WRITE(6)
    0x10, // WRITE FILEMARKS(6)
    0x11, // SPACE(6)
    0x15, // MODE SELECT(6)
    0x16, // RESERVE(6)
    0x17, // RELEASE(6)
    0x2a, // WRITE(10)
    0x2e, // WRITE AND VERIFY(10)
    0x35, // SYNCHRONIZE CACHE(10)
    0x41, // WRITE SAME(10)
    0x42, // UNMAP
    0x53, // RESERVE TRACK
    0x54, // SEND OPC INFORMATION
    0x55, // MODE SELECT(10)
    0x56, // RESERVE(10)
    0x57, // RELEASE(10)
    0x5b, // CLOSE TRACK/SESSION
    0x5d, // SEND CUE SHEET
    0x5f, // PERSISTENT RESERVE OUT
    0x89, // COMPARE AND WRITE
    0x8a, // WRITE(16)
    0x8b, // ORWRITE(16)
    0x8e, // WRITE AND VERIFY(16)
    0x91, // SYNCHRONIZE CACHE(16)
    0x93, // WRITE SAME(16)
    0x9c, // WRITE ATOMIC(16)
    0xaa, // WRITE(12)
    0xae, // WRITE AND VERIFY(12)
];

/// Returns the CDB of a command that a guest may send, without what follows it; `None` if it may not.
pub fn command(field: &[u8], read_only: bool) -> Option<&[u8]> {
    let operation = *field.first()?;
    let is_allowed = READS.contains(&operation) || !read_only && WRITES.contains(&operation);
    if !is_allowed {
        return None;
    }
    let length = match operation >> 5 {
        0 => 6,
        1 | 2 => 10,
        4 => 16,
        5 => 12,
        _ => return None,
    };
    field.get(..length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_length_of_their_group() {
        let field = |operation| [&[operation][..], &[0; 31]].concat();
        for (operation, length) in [(0x12, 6), (0x28, 10), (0x5a, 10), (0x88, 16), (0xa0, 12)] {
            let field = field(operation);
            assert_eq!(command(&field, true).unwrap().len(), length);
        }
        assert_eq!(command(&[0x88; 10], false), None, "it is cut off");
        assert_eq!(command(&[], false), None);
    }

    #[test]
    fn commands_that_could_do_harm_are_refused() {
        // FORMAT UNIT, SEND DIAGNOSTIC, WRITE BUFFER, SANITIZE, LOG SELECT, ATA PASS-THROUGH, SECURITY PROTOCOL OUT, MAINTENANCE OUT,
        // vendor specific.
        for operation in [
            0x04, 0x1d, 0x3b, 0x48, 0x4c, 0x7f, 0x85, 0xa1, 0xb5, 0xc0, 0xff,
        ] {
            assert_eq!(command(&[operation; 32], false), None, "{operation:#x}");
        }
    }

    #[test]
    fn a_device_that_may_not_be_written_is_not() {
        for operation in WRITES {
            assert_eq!(command(&[*operation; 32], true), None, "{operation:#x}");
        }
    }
}
