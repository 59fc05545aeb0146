// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The part of the demo with a screen: a guest draws on it, and QEMU saves the picture.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vhost_device_tests::guest::kernel::Flavour;
use vhost_device_tests::guest::picture::Picture;
use vhost_device_tests::guest::{Guest, GuestError, Machine};

use super::back_end::BackEnd;
use crate::progress::Progress;
use crate::workspace::target_directory;

pub const GPU: &str = "vhost-device-gpu";

/// Time limit for a picture to get from the guest to the display.
const PATIENCE: Duration = Duration::from_secs(30);

/// The script that the guest runs: it writes text and coloured bars on the console.
const SCRIPT: &str = r#"
    until [ -e /dev/fb0 ]; do sleep 0.1; done
    echo "@screen $(tr ',' 'x' < /sys/class/graphics/fb0/virtual_size) on $(cat /sys/class/graphics/fb0/name)"
    bars() {
        for row in 1 2 3 4; do
            for colour in 41 43 42 46 44 45 47; do printf "\033[${colour}m%18s" ''; done
            printf '\033[0m\n'
        done
    }
    {
        printf '\033[?25l\033[2J\033[H\n  Linux %s on the screen of vhost-device-gpu\n\n' $(uname -r)
        bars
        printf '\n'
        sed 's/^/  /' /proc/meminfo | head -20
        printf '\n'
        bars
    } > /dev/tty1
    echo "@drawn"
    read forever < /dev/tty1
"#;

/// A colour of the bars.
const MAGENTA: [u8; 3] = [170, 0, 170];

/// Shows what a guest draws, and saves the picture.
pub fn run(progress: &Progress) -> Result<(), String> {
    let back_end = BackEnd::start(progress, GPU, &[])?;
    progress.step("Booting a guest with this screen");
    let guest = Machine::new("demo-gpu", SCRIPT)
        .kernel(Flavour::Plain)
        .module("virtio_gpu")
        .vhost_user("vhost-user-gpu-pci,xres=1024,yres=768", &back_end.socket)
        .start();
    guest
        .and_then(|mut guest| show(progress, &mut guest))
        .map_err(|error| format!("{error}\nlog of {GPU}:\n{}", back_end.program.stderr()))
}

fn show(progress: &Progress, guest: &mut Guest) -> Result<(), GuestError> {
    let screen = guest.wait("screen")?;
    progress.step(&format!("  guest: screen: {screen}"));
    guest.wait("drawn")?;
    let directory = target_directory().join("demo");
    fs::create_dir_all(&directory)
        .map_err(|error| GuestError::System(format!("create {}", directory.display()), error))?;
    let path = directory.join("screen.png");
    wait_for_picture(guest, &path)?;
    progress.step(&format!(
        "The guest's screen is saved in {}",
        path.display()
    ));
    Ok(())
}

/// Saves the screen repeatedly until it shows the bars.
fn wait_for_picture(guest: &Guest, path: &Path) -> Result<(), GuestError> {
    let dump = json!({ "filename": path, "format": "png" });
    let deadline = Instant::now() + PATIENCE;
    loop {
        guest.qmp()?.execute("screendump", dump.clone())?;
        let picture = Picture::read(path)?;
        let is_last = |row: usize| picture.row(row).contains(&MAGENTA);
        // The guest draws the bars at the bottom last.
        if (picture.height / 3..picture.height).any(is_last) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(GuestError::Guest("did not show what it drew".into()));
        }
        thread::sleep(Duration::from_millis(100));
    }
}
