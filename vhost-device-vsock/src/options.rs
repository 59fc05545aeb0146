// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line options of the socket device.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use crate::packet::FIRST_GUEST_CID;
use crate::ports::Ports;

/// Options of the socket device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Address (context id) of the guest: 3 or higher.
    #[arg(long, value_name = "CID", value_parser = clap::value_parser!(u32).range(i64::from(FIRST_GUEST_CID)..i64::from(u32::MAX)))]
    pub guest_cid: u32,

    /// Connect the guest with unix sockets of the host.
    ///
    /// A connection of the guest to port N of the host (CID 2) goes to the socket PATH_N, where a program of the host listens. A program
    /// that connects to PATH and sends the line `CONNECT N` is connected to port N of the guest, and receives the line `OK` with a port
    /// number first. PATH is for SOCK_STREAM, and PATH_seqpacket for SOCK_SEQPACKET. The rules for --socket-path apply to both.
    #[arg(
        long,
        value_name = "PATH",
        group = "files",
        required_unless_present = "host_vsock"
    )]
    pub uds_path: Option<PathBuf>,

    /// Connect the guest with another guest: connections to CID go to the socket that the other guest has as --uds-path.
    ///
    /// The other guest sees them as connections of the host. Can be given several times.
    #[arg(long, value_name = "cid=CID,uds-path=PATH")]
    pub forward: Vec<Forward>,

    /// Connect the guest with AF_VSOCK sockets of the host: a connection to port N of the host goes to port N of CID 1.
    ///
    /// With --uds-path, this is for ports without a socket PATH_N. The host needs the kernel module vsock_loopback.
    #[arg(long)]
    pub host_vsock: bool,

    /// Ports to which the guest can connect: a list of ports and ranges such as 22,1024-2047. All by default.
    #[arg(long, value_name = "PORTS")]
    pub allow_ports: Option<Ports>,

    /// Maximum number of connections at a time; further ones are refused.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    pub max_connections: u32,
}

/// Highest value of `--max-connections`: a process cannot have more open files by default.
const MAX_CONNECTIONS: i64 = 1 << 20;

/// A sibling guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Its address.
    pub cid: u32,
    /// The socket on which its device accepts connections.
    pub path: PathBuf,
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = match text.strip_prefix("cid=") {
            Some(rest) => rest.split_once(",uds-path="),
            None => text.strip_prefix("uds-path=").and_then(|rest| {
                let (path, cid) = rest.rsplit_once(",cid=")?;
                Some((cid, path))
            }),
        };
        parts
            .and_then(|(cid, path)| {
                let cid = cid.parse().ok()?;
                let valid = (FIRST_GUEST_CID..u32::MAX).contains(&cid) && !path.is_empty();
                valid.then(|| Self {
                    cid,
                    path: path.into(),
                })
            })
            .ok_or_else(|| "must be cid=CID,uds-path=PATH, with a CID of 3 or higher".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forward_has_a_cid_and_a_path() {
        let forward = |text: &str| text.parse::<Forward>().ok();
        let expected = |cid, path: &str| {
            let path = path.into();
            Some(Forward { cid, path })
        };
        assert_eq!(forward("cid=4,uds-path=/a"), expected(4, "/a"));
        assert_eq!(forward("uds-path=/a,b,cid=5"), expected(5, "/a,b"));
        assert_eq!(forward("cid=4,uds-path=/a,b=c"), expected(4, "/a,b=c"));
        for bad in [
            "",
            "cid=4",
            "uds-path=/a",
            "cid=2,uds-path=/a",
            "cid=4294967295,uds-path=/a",
            "cid=x,uds-path=/a",
            "cid=4,uds-path=",
            "cid=4;uds-path=/a",
        ] {
            assert_eq!(forward(bad), None, "{bad:?}");
        }
    }
}
