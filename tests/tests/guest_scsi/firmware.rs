// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine boots from a disk of the SCSI host: SeaBIOS finds it by itself, and uses only the first request queue.

use std::fs;

use vhost_device_tests::guest::{QEMU, find_program};
use vhost_device_tests::process::Program;

use crate::{BackEnd, PATIENCE};

/// A boot sector: it reads the next sector by the firmware (int 13h), writes the text in it to the first serial port, and resets the machine.
const BOOT: &[u8] = &[
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x8e, 0xc0, // mov es, ax
    0x8e, 0xd0, // mov ss, ax
    0xbc, 0x00, 0x7c, // mov sp, 0x7c00
    0xb8, 0x01, 0x02, // mov ax, 0x0201: read one sector
    0xbb, 0x00, 0x7e, // mov bx, 0x7e00: to here
    0xb9, 0x02, 0x00, // mov cx, 2: the second one of the first track
    0xb6, 0x00, // mov dh, 0
    0xcd, 0x13, // int 0x13
    0xbe, 0x00, 0x7e, // mov si, 0x7e00
    0xac, // lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x06, // jz the end of the text
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xeb, 0xf5, // jmp lodsb
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al: the keyboard controller resets the machine
    0xf4, // hlt
    0xeb, 0xfd, // jmp hlt
];
const TEXT: &str = "read by the firmware from the second sector\n";

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn seabios_boots_from_a_disk() {
    let mut image = vec![0; 1 << 20];
    image[..BOOT.len()].copy_from_slice(BOOT);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    image[512..512 + TEXT.len()].copy_from_slice(TEXT.as_bytes());
    let back_end = BackEnd::start(&[(&image, ",target=3")]);
    let mut command = std::process::Command::new(find_program(QEMU).expect(QEMU));
    command
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-m",
            "128M",
        ])
        .args(["-machine", "q35,accel=tcg,memory-backend=memory"])
        .args([
            "-object",
            "memory-backend-memfd,id=memory,size=128M,share=on",
        ])
        .arg("-chardev")
        .arg(format!(
            "socket,id=scsi,path={}",
            back_end.path("socket").display()
        ))
        .args(["-device", "vhost-user-scsi-pci,chardev=scsi"])
        .arg("-serial")
        .arg(format!("file:{}", back_end.path("serial").display()));
    let mut machine = Program::spawn(&mut command).unwrap();
    let status = machine.wait(PATIENCE).unwrap();
    let text = fs::read_to_string(back_end.path("serial")).unwrap();
    assert!(status.success() && text == TEXT, "{status}: {text:?}");
}
