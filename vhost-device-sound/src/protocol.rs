// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Numbers and structures of the sound device (VIRTIO 1.3, 5.14).

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Index of the control queue.
pub const CONTROL_QUEUE: u16 = 0;
/// Index of the event queue.
pub const EVENT_QUEUE: u16 = 1;
/// Index of the queue with the buffers of output streams.
pub const TX_QUEUE: u16 = 2;
/// Index of the queue with the buffers of input streams.
pub const RX_QUEUE: u16 = 3;

/// VIRTIO_SND_F_CTLS: the device has control elements.
pub const F_CTLS: u64 = 1;

/// VIRTIO_SND_PCM_F_EVT_XRUNS: the driver gets an event for each underrun and overrun.
pub const PCM_F_EVT_XRUNS: u32 = 1 << 4;

/// Control requests (VIRTIO_SND_R_*).
pub mod request {
    pub const JACK_INFO: u32 = 1;
    pub const JACK_REMAP: u32 = 2;
    pub const PCM_INFO: u32 = 0x100;
    pub const PCM_SET_PARAMS: u32 = 0x101;
    pub const PCM_PREPARE: u32 = 0x102;
    pub const PCM_RELEASE: u32 = 0x103;
    pub const PCM_START: u32 = 0x104;
    pub const PCM_STOP: u32 = 0x105;
    pub const CHMAP_INFO: u32 = 0x200;
    pub const CTL_INFO: u32 = 0x300;
    pub const CTL_READ: u32 = 0x302;
    pub const CTL_WRITE: u32 = 0x303;
    pub const CTL_TLV_READ: u32 = 0x304;
    pub const CTL_TLV_COMMAND: u32 = 0x306;
}

/// Status of a request (VIRTIO_SND_S_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// It succeeded.
    Ok = 0x8000,
    /// It is malformed, or not possible in this state.
    BadMessage = 0x8001,
    /// The device does not support it.
    NotSupported = 0x8002,
    /// The host failed.
    IoError = 0x8003,
}

impl Status {
    /// Returns the number on the wire.
    pub fn number(self) -> u32 {
        self as u32
    }
}

/// Direction of a stream (VIRTIO_SND_D_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// From the guest to the host: playback.
    Output,
    /// From the host to the guest: capture.
    Input,
}

impl Direction {
    /// Returns the number on the wire.
    pub fn number(self) -> u8 {
        match self {
            Self::Output => 0,
            Self::Input => 1,
        }
    }

    /// Returns the index of the queue with its buffers.
    pub fn queue(self) -> u16 {
        match self {
            Self::Output => TX_QUEUE,
            Self::Input => RX_QUEUE,
        }
    }

    /// Returns its name in options and in the results of commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Input => "input",
        }
    }
}

/// struct virtio_snd_query_info, without the code.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct QueryInfo {
    /// The first item.
    pub start: U32,
    /// Number of items.
    pub count: U32,
    /// Size of the driver's structure for an item, in bytes.
    pub size: U32,
}
const _: () = assert!(size_of::<QueryInfo>() == 12);

/// struct virtio_snd_pcm_info.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PcmInfo {
    /// Function group; Linux numbers its PCM devices by it.
    pub group: U32,
    /// VIRTIO_SND_PCM_F_*.
    pub features: U32,
    /// Bits of the formats.
    pub formats: U64,
    /// Bits of the rates.
    pub rates: U64,
    /// Direction.
    pub direction: u8,
    /// Minimum number of channels.
    pub channels_min: u8,
    /// Maximum number of channels.
    pub channels_max: u8,
    /// Zeroes.
    pub padding: [u8; 5],
}
const _: () = assert!(size_of::<PcmInfo>() == 32);

/// struct virtio_snd_jack_info.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct JackInfo {
    /// Function group.
    pub group: U32,
    /// VIRTIO_SND_JACK_F_*.
    pub features: U32,
    /// Pin configuration (HDA 7.3.3.31).
    pub configuration: U32,
    /// Pin capabilities (HDA 7.3.4.9).
    pub capabilities: U32,
    /// 1 if something is plugged in.
    pub connected: u8,
    /// Zeroes.
    pub padding: [u8; 7],
}
const _: () = assert!(size_of::<JackInfo>() == 24);

/// Number of places in a channel map.
pub const CHMAP_POSITIONS: usize = 18;

/// struct virtio_snd_chmap_info.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChmapInfo {
    /// Function group.
    pub group: U32,
    /// Direction.
    pub direction: u8,
    /// Number of channels.
    pub channels: u8,
    /// Position of each channel (VIRTIO_SND_CHMAP_*).
    pub positions: [u8; CHMAP_POSITIONS],
}
const _: () = assert!(size_of::<ChmapInfo>() == 24);

/// struct virtio_snd_pcm_set_params, without the code and the stream.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SetParams {
    /// Size of the driver's buffer.
    pub buffer_bytes: U32,
    /// Size of a period.
    pub period_bytes: U32,
    /// VIRTIO_SND_PCM_F_*.
    pub features: U32,
    /// Number of channels.
    pub channels: u8,
    /// VIRTIO_SND_PCM_FMT_*.
    pub format: u8,
    /// VIRTIO_SND_PCM_RATE_*.
    pub rate: u8,
    /// Ignored.
    pub padding: u8,
}
const _: () = assert!(size_of::<SetParams>() == 16);

/// struct virtio_snd_pcm_status: the end of each buffer of a stream.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PcmStatus {
    /// A [`Status`].
    pub status: U32,
    /// Bytes that the guest has played and that are not audible yet.
    pub latency_bytes: U32,
}
/// Size of [`PcmStatus`] in bytes.
pub const PCM_STATUS_SIZE: u32 = 8;
const _: () = assert!(size_of::<PcmStatus>() == PCM_STATUS_SIZE as usize);

/// struct virtio_snd_ctl_info up to `name`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ElementInfo {
    /// Function group.
    pub group: U32,
    /// Direction and VIRTIO_SND_CTL_ROLE_*.
    pub role: U32,
    /// VIRTIO_SND_CTL_TYPE_*.
    pub kind: U32,
    /// VIRTIO_SND_CTL_ACCESS_*.
    pub access: U32,
    /// Number of values.
    pub count: U32,
    /// Index, for elements of the same name.
    pub index: U32,
    /// Name, zero-terminated.
    pub name: [u8; 44],
}
const _: () = assert!(size_of::<ElementInfo>() == 68);

/// The end of struct virtio_snd_ctl_info for an element of integers.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IntegerRange {
    /// Minimum.
    pub min: U32,
    /// Maximum.
    pub max: U32,
    /// Step.
    pub step: U32,
}
const _: () = assert!(size_of::<IntegerRange>() == 12);

/// Size of struct virtio_snd_ctl_info without padding.
pub const ELEMENT_INFO_SIZE: usize = 92;
/// Offset of the range in a structure of [`ELEMENT_INFO_SIZE`].
pub const ELEMENT_RANGE: usize = 68;
/// Size of Linux's struct virtio_snd_ctl_info, whose range is aligned to 8 bytes.
pub const ALIGNED_ELEMENT_INFO_SIZE: usize = 96;
/// Offset of the range in a structure of at least [`ALIGNED_ELEMENT_INFO_SIZE`].
pub const ALIGNED_ELEMENT_RANGE: usize = 72;
/// Size of struct virtio_snd_ctl_value in bytes.
pub const ELEMENT_VALUE_SIZE: usize = 512;

/// A notification (struct virtio_snd_event, struct virtio_snd_ctl_event).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A jack was plugged in or out.
    Jack {
        /// The jack.
        jack: u32,
        /// Whether something is plugged in now.
        connected: bool,
    },
    /// An underrun or overrun of a stream.
    Xrun(u32),
    /// The value of a control element has changed.
    Value(u16),
}

impl Event {
    /// Size on the wire, in bytes.
    pub const SIZE: u32 = 8;

    /// Returns the bytes on the wire.
    pub fn to_bytes(self) -> [u8; Self::SIZE as usize] {
        const JACK_CONNECTED: u32 = 0x1000;
        const JACK_DISCONNECTED: u32 = 0x1001;
        const PCM_XRUN: u32 = 0x1101;
        const CTL_NOTIFY: u32 = 0x1200;
        /// VIRTIO_SND_CTL_EVT_MASK_VALUE.
        const VALUE: u16 = 1;
        let (code, data) = match self {
            Self::Jack { jack, connected } => match connected {
                true => (JACK_CONNECTED, U32::new(jack)),
                false => (JACK_DISCONNECTED, U32::new(jack)),
            },
            Self::Xrun(stream) => (PCM_XRUN, U32::new(stream)),
            Self::Value(element) => {
                let pair = [U16::new(element), U16::new(VALUE)];
                (CTL_NOTIFY, zerocopy::transmute!(pair))
            }
        };
        zerocopy::transmute!([U32::new(code), data])
    }

    /// Returns whether this event replaces `earlier`, which was not sent yet.
    pub fn replaces(self, earlier: Self) -> bool {
        match (self, earlier) {
            (Self::Jack { jack, .. }, Self::Jack { jack: other, .. }) => jack == other,
            _ => self == earlier,
        }
    }
}
