// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The JSON documents of a back-end, with the names of QEMU's schema `vhost-user.json`.
//!
//! Types and features are strings in the documents, so that documents with unknown names can be read. The enums contain the names that
//! the schema defines.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

macro_rules! names {
    ($(#[$attribute:meta])* $enum:ident { $($variant:ident = $name:literal,)* }) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $enum {
            $(
                #[doc = concat!("`", $name, "`")]
                #[serde(rename = $name)]
                $variant,
            )*
        }

        impl $enum {
            /// All values, in the order of the schema.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Returns the name in JSON.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Returns the value with this name in JSON.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| known.name() == name)
            }
        }
    };
}

names! {
    /// Type of the device of a back-end.
    VHostUserBackendType {
        NineP = "9p",
        Balloon = "balloon",
        Block = "block",
        Caif = "caif",
        Console = "console",
        Crypto = "crypto",
        Gpu = "gpu",
        Input = "input",
        Net = "net",
        Rng = "rng",
        Rpmsg = "rpmsg",
        RprocSerial = "rproc-serial",
        Scsi = "scsi",
        Vsock = "vsock",
        Fs = "fs",
    }
}

names! {
    /// Optional features of a block device.
    VHostUserBackendBlockFeature {
        ReadOnly = "read-only",
        BlkFile = "blk-file",
    }
}

names! {
    /// Optional features of an input device.
    VHostUserBackendInputFeature {
        EvdevPath = "evdev-path",
        NoGrab = "no-grab",
    }
}

names! {
    /// Optional features of a GPU.
    VHostUserBackendGPUFeature {
        RenderNode = "render-node",
        Virgl = "virgl",
    }
}

/// The capabilities of a back-end on this host, as `--print-capabilities` prints them.
///
/// In the schema this is a union in which only input devices and GPUs have features. Our block device prints features too, and our other
/// devices print an empty list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VHostUserBackendCapabilities {
    /// A [`VHostUserBackendType`], or a type that the schema does not define.
    pub r#type: String,
    /// Features of this type. The schema does not need to define them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
}

impl VHostUserBackendCapabilities {
    /// Returns whether the list of features contains `feature`.
    pub fn has(&self, feature: &str) -> bool {
        let mut features = self.features.iter().flatten();
        features.any(|available| available == feature)
    }
}

/// The descriptor of a back-end: the content of a `50-*.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUserBackend {
    /// A description for people. The schema requires it.
    #[serde(default)]
    pub description: String,
    /// A [`VHostUserBackendType`], or a type that the schema does not define.
    pub r#type: String,
    /// Absolute path of the program.
    pub binary: String,
    /// Words with a meaning only for those who installed the descriptor.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
}

/// Reads one of the documents.
///
/// # Errors
/// Fails if `text` is not one JSON object with the required keys, or if libvirt would refuse it: an object has a member twice, or a string
/// is not UTF-8.
pub fn read<T: DeserializeOwned>(text: &[u8]) -> serde_json::Result<T> {
    // Serde also reads a struct from an array.
    if let [b'[', ..] = text.trim_ascii_start() {
        return Err(Error::custom("an array instead of an object"));
    }
    let document = serde_json::from_slice(text)?;
    // Serde does not check the values that it ignores.
    str::from_utf8(text).map_err(Error::custom)?;
    match serde_json::from_slice::<Unique>(text) {
        Err(error) if error.is_data() => Err(error),
        _ => Ok(document),
    }
}

/// Any value in which no object has the same member twice.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Self;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Self, A::Error> {
        let mut names = BTreeSet::new();
        while let Some(name) = members.next_key::<String>()? {
            if names.contains(&name) {
                return Err(Error::custom(format!("the member {name:?} twice")));
            }
            names.insert(name);
            members.next_value::<Self>()?;
        }
        Ok(self)
    }
}
