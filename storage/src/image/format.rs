// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Recognizes images of other formats, for a warning. They are served raw all the same: the guest may have written the signature itself,
//! so only the person who starts the program can tell.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes that are examined.
const LENGTH: usize = 4096;

/// The name of a format, and the bytes that its images have at an offset.
const SIGNATURES: [(&str, usize, &[u8]); 7] = [
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("a VHDX image", 0, b"vhdxfile"),
    ("a VMDK image", 0, b"KDMV"),
    ("a VMDK image", 0, b"COWD"),
    ("a VMDK image", 0, b"# Disk DescriptorFile"),
    ("a VDI image", 64, &[0x7f, 0x10, 0xda, 0xbe]),
];

/// Aligned for O_DIRECT.
#[repr(align(4096))]
struct Buffer([u8; LENGTH]);

/// Returns the format that the image appears to have, if it is not raw.
pub fn other_than_raw(image: &File) -> Option<&'static str> {
    let mut buffer = Buffer([0; LENGTH]);
    image.read_at(&mut buffer.0, 0).ok()?;
    let is = |offset, signature| {
        let bytes: Option<&[u8]> = buffer.0.get(offset..);
        bytes.is_some_and(|bytes| bytes.starts_with(signature))
    };
    let found = SIGNATURES.iter();
    found
        .copied()
        .find_map(|(name, offset, signature)| is(offset, signature).then_some(name))
}
