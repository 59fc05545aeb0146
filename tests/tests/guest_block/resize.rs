// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk that grows under a guest.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vhost_device_tests::process::Signal;

use super::{Block, MIB, random};

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn linux_follows_an_image_that_grows() {
    let mut block = Block::start(4, &[]);
    let script = r#"
        size() { cat /sys/block/vda/size; }
        echo "@first $(size)"
        until [ "$(size)" = 24576 ]; do sleep 0.05; done
        dd if=/dev/vda of=/tmp/new bs=1M skip=4 iflag=direct
        echo "@second $(wc -c < /tmp/new) $(md5sum < /tmp/new | cut -d' ' -f1)"
        dd if=/tmp/new of=/dev/vda bs=1M count=1 seek=11 oflag=direct conv=notrunc
        until [ "$(size)" = 32768 ]; do sleep 0.05; done
        echo "@third"
    "#;
    let mut guest = block.machine("resize", "", script).start().unwrap();
    assert_eq!(guest.wait("first").unwrap(), "8192");
    let image = File::options().write(true).open(block.image()).unwrap();
    let new = random(8 * MIB);
    image.write_all_at(&new, 4 * MIB as u64).unwrap();
    block.program.signal(Signal::HUP).unwrap();
    let expected = block.directory.path().join("new");
    std::fs::write(&expected, &new).unwrap();
    let seen = guest.wait("second").unwrap();
    assert_eq!(seen, format!("{} {}", 8 * MIB, super::md5(&expected)));
    image.set_len(16 * MIB as u64).unwrap();
    block.program.signal(Signal::HUP).unwrap();
    guest.wait("third").unwrap();
    guest.finish().unwrap();
    assert!(block.content()[11 * MIB..12 * MIB] == new[..MIB]);
    assert_eq!(guest.qemu_stderr(), "");
}
