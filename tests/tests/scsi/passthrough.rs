// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is not passed on to a guest. The suite `guest_scsi` passes a SCSI device of a host on.

use std::fs;
use std::path::Path;
use std::time::Instant;

use vhost_device_tests::process::{Program, command, option};

use crate::PATIENCE;

#[test]
fn what_is_no_scsi_device_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "text").unwrap();
    for (path, word) in [
        (Path::new("/dev/null"), "does not take SCSI commands"),
        (&file, "no SCSI device"),
        (Path::new("/dev/no-such-device"), "cannot open it"),
    ] {
        let mut command = command("vhost-device-scsi").unwrap();
        command
            .arg(option("socket-path", directory.path().join("socket")))
            .arg(option("passthrough", path));
        let begin = Instant::now();
        let mut program = Program::spawn(&mut command).unwrap();
        assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(1));
        assert!(begin.elapsed() < PATIENCE);
        let log = program.stderr();
        assert!(log.contains(word), "{log}");
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}
