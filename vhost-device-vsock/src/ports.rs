// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sets of ports (`--allow-ports`).

use std::ops::RangeInclusive;
use std::str::FromStr;

/// A list of ports and ranges of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(Vec<RangeInclusive<u32>>);

impl Ports {
    /// Returns whether `port` is in the set.
    pub fn contains(&self, port: u32) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = |item: &str| {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let range = first.parse().ok()?..=last.parse().ok()?;
            (!range.is_empty()).then_some(range)
        };
        let ranges: Option<_> = text.split(',').map(range).collect();
        ranges
            .map(Self)
            .ok_or_else(|| "must be ports and ranges of ports, such as 22,1024-2047".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_a_list_of_ports_and_ranges() {
        let ports: Ports = "22,1024-2047,4294967295".parse().unwrap();
        for inside in [22, 1024, 1500, 2047, u32::MAX] {
            assert!(ports.contains(inside), "{inside}");
        }
        for outside in [0, 21, 23, 1023, 2048, u32::MAX - 1] {
            assert!(!ports.contains(outside), "{outside}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            ",",
            "a",
            "1-",
            "-1",
            "2-1",
            "1,,2",
            "4294967296",
            "1-2-3",
        ] {
            assert!(text.parse::<Ports>().is_err(), "{text:?}");
        }
    }
}
