// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The JSON that a back-end ships and prints, with the names of QEMU's schema `vhost-user.json`.
//!
//! Names of types and features are strings in the documents, so that one who reads them gets through
//! those that the schema does not know; the enums say which it does.

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
            /// All of them, in the order of the schema.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// What it is called in JSON.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// The one that is called `name` in JSON.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| known.name() == name)
            }
        }
    };
}

names! {
    /// What kind of device a back-end is.
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

/// What a back-end can do on this host: what it prints for `--print-capabilities`.
///
/// In the schema this is a union, in which only input devices and GPUs have features. Block devices
/// print theirs all the same, and other types an empty list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VHostUserBackendCapabilities {
    /// A [`VHostUserBackendType`], or a type that the schema does not know.
    pub r#type: String,
    /// Features of that type, some of which the schema may not know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
}

impl VHostUserBackendCapabilities {
    /// Whether `feature` is among the features.
    pub fn has(&self, feature: &str) -> bool {
        let mut features = self.features.iter().flatten();
        features.any(|available| available == feature)
    }
}

/// How a back-end describes itself: the content of a `50-*.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUserBackend {
    /// For people. The schema wants it, but nothing depends on it.
    #[serde(default)]
    pub description: String,
    /// A [`VHostUserBackendType`], or a type that the schema does not know.
    pub r#type: String,
    /// Absolute path of the program.
    pub binary: String,
    /// Words of whoever installed it; without meaning for management software.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
}

/// Reads one of the documents.
///
/// # Errors
/// It is not one JSON object with the keys that there must be, or libvirt does not take it: some object has a member twice, or some
/// text is not UTF-8, known to the schema or not.
pub fn read<T: DeserializeOwned>(text: &[u8]) -> serde_json::Result<T> {
    // Serde would take an array for a struct as well.
    if let [b'[', ..] = text.trim_ascii_start() {
        return Err(Error::custom("an array instead of an object"));
    }
    let document = serde_json::from_slice(text)?;
    // Serde does not look into what it passes over.
    str::from_utf8(text).map_err(Error::custom)?;
    match serde_json::from_slice::<Unique>(text) {
        Err(error) if error.is_data() => Err(error),
        _ => Ok(document),
    }
}

/// Any value in which no object has a member twice.
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
