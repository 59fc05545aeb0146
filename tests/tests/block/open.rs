// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How the image is named, opened and recognized: by path or as an inherited file, and the warnings about likely mistakes.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::geteuid;
use tempfile::TempDir;
use vhost_device_tests::process::{Program, command, inherit, option};

use crate::{Device, Disk, IMAGE_SIZE, PATIENCE, Variant, assert_same, noise, ok, skip};

/// The number that an inherited file has.
const NUMBER: i32 = 7;

/// The user `nobody`.
const NOBODY: u32 = 65534;

/// Both ways to name an inherited file.
const WAYS: [&str; 2] = ["--blk-fd=7", "--blk-file=/dev/fd/7"];

/// First bytes of other image formats, and the names of these.
const FORMATS: [(&[u8], usize, &str); 8] = [
    (b"QFI\xfb\0\0\0\x03", 0, "qcow2"),
    (b"LUKS\xba\xbe\0\x01", 0, "LUKS"),
    (b"LUKS\xba\xbe\0\x02", 0, "LUKS"),
    (b"vhdxfile", 0, "VHDX"),
    (b"KDMV\x01\0\0\0", 0, "VMDK"),
    (b"# Disk DescriptorFile\n", 0, "VMDK"),
    (b"COWD\x01\0\0\0", 0, "VMDK"),
    (&[0x7f, 0x10, 0xda, 0xbe], 64, "VDI"),
];

/// Returns what starts the device with this file, listening in a new directory.
fn inheriting(file: impl Into<OwnedFd>, arguments: &[&str]) -> (Command, PathBuf, TempDir) {
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("socket");
    let mut command = command("vhost-device-block").unwrap();
    command
        .env_remove("RUST_LOG")
        .arg(option("socket-path", &socket))
        .args(arguments);
    inherit(&mut command, file.into(), NUMBER);
    (command, socket, sockets)
}

fn serve((mut command, socket, sockets): (Command, PathBuf, TempDir), image: PathBuf) -> Disk {
    let program = Program::serve(&mut command, &socket).unwrap();
    Disk::connect(Device {
        program,
        socket,
        image,
        _directories: vec![sockets],
    })
}

/// Panics unless the program refuses to start, with one line that has these words.
fn assert_refused(command: &mut Command, words: &[&str]) {
    let mut program = Program::spawn(command).unwrap();
    let status = program.wait(PATIENCE).unwrap();
    let log = program.stderr();
    assert_eq!(status.code(), Some(1), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
    for word in words {
        assert!(log.contains(word), "no {word:?} in {log}");
    }
}

/// Returns a file with these contents in a directory of its own.
fn image(contents: &[u8]) -> (TempDir, PathBuf) {
    let directory = Variant::THREADS.directory();
    let path = directory.path().join("image");
    fs::write(&path, contents).unwrap();
    (directory, path)
}

fn writable() -> OpenOptions {
    File::options().read(true).write(true).clone()
}

#[test]
fn an_inherited_deleted_file_is_served() {
    for way in WAYS {
        let contents = noise(1, IMAGE_SIZE);
        let (_directory, path) = image(&contents);
        let file = writable().open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let host = file.try_clone().unwrap();
        let mut disk = serve(inheriting(file, &[way]), path);
        assert_same(
            &ok(disk.driver.read(0, 4096).unwrap()),
            &contents[..4096],
            way,
        );
        let data = noise(2, 4096);
        ok(disk.driver.write(8, &data).unwrap());
        let mut seen = vec![0; 4096];
        host.read_exact_at(&mut seen, 4096).unwrap();
        assert_same(&seen, &data, way);
    }
}

#[test]
fn an_inherited_file_is_served_to_a_user_who_may_not_open_it() {
    if !geteuid().is_root() {
        return skip("only root can start a program as another user");
    }
    for way in WAYS {
        let contents = noise(1, IMAGE_SIZE);
        let (_directory, path) = image(&contents);
        let file = writable().open(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o000)).unwrap();
        let (mut command, socket, sockets) = inheriting(file, &[way]);
        fs::set_permissions(sockets.path(), Permissions::from_mode(0o777)).unwrap();
        command.uid(NOBODY).gid(NOBODY);
        let mut disk = serve((command, socket, sockets), path);
        assert_same(
            &ok(disk.driver.read(0, 4096).unwrap()),
            &contents[..4096],
            way,
        );
    }
}

#[test]
fn memory_that_is_a_file_is_served() {
    let memory = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(IMAGE_SIZE as u64).unwrap();
    let host = memory.try_clone().unwrap();
    let mut disk = serve(inheriting(memory, &["--blk-fd=7"]), PathBuf::new());
    let data = noise(2, 4096);
    ok(disk.driver.write(8, &data).unwrap());
    let mut seen = vec![0; 4096];
    host.read_exact_at(&mut seen, 4096).unwrap();
    assert_same(&seen, &data, "memory");
}

#[test]
fn an_inherited_file_must_be_open_for_reading_and_writing() {
    let (_directory, path) = image(&[0; IMAGE_SIZE]);
    let read_only = || File::open(&path).unwrap();
    for way in WAYS {
        assert_refused(&mut inheriting(read_only(), &[way]).0, &["--read-only"]);
        let write_only = OpenOptions::new().write(true).open(&path).unwrap();
        assert_refused(&mut inheriting(write_only, &[way]).0, &["read"]);
        let appending = File::options().read(true).append(true).open(&path).unwrap();
        assert_refused(&mut inheriting(appending, &[way]).0, &["O_APPEND"]);
        let arguments = [way, "--read-only"];
        let mut disk = serve(inheriting(read_only(), &arguments), path.clone());
        ok(disk.driver.read(0, 512).unwrap());
    }
}

#[test]
fn a_file_inherited_with_o_path_is_opened() {
    let (_directory, path) = image(&[0; IMAGE_SIZE]);
    let place = writable().custom_flags(libc::O_PATH).open(&path).unwrap();
    let mut disk = serve(inheriting(place, &["--blk-fd=7"]), path.clone());
    ok(disk.driver.write(0, &[1; 512]).unwrap());
    assert_eq!(fs::read(&path).unwrap()[..512], [1; 512]);
}

#[test]
fn an_inherited_file_that_another_program_writes_to_is_refused() {
    let device = Variant::THREADS.start(&[0; IMAGE_SIZE], &[]);
    let (mut command, ..) = inheriting(device.file(), &["--blk-fd=7"]);
    assert_refused(&mut command, &["--blk-fd=7", "in use"]);
}

#[test]
fn an_inherited_file_that_is_no_image_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let socket = UnixListener::bind(directory.path().join("listener")).unwrap();
    assert_refused(
        &mut inheriting(socket, &["--blk-fd=7"]).0,
        &["--blk-fd=7", "socket"],
    );
    let null = writable().open("/dev/null").unwrap();
    assert_refused(&mut inheriting(null, &["--blk-fd=7"]).0, &["--blk-fd=7"]);
    let null = File::open("/dev/null").unwrap();
    assert_refused(
        &mut inheriting(null, &["--blk-fd=8"]).0,
        &["--blk-fd=8", "open"],
    );
    // One number cannot be both.
    let socket = UnixListener::bind(directory.path().join("both")).unwrap();
    let mut both = command("vhost-device-block").unwrap();
    both.args(["--fd=7", "--blk-fd=7"]);
    inherit(&mut both, socket.into(), NUMBER);
    assert_refused(&mut both, &["--blk-fd=7", "--fd"]);
}

#[test]
fn a_uri_is_no_local_file() {
    for uri in [
        "nbd://host/export",
        "rbd://pool/image",
        "https://host/disk.img",
    ] {
        let mut command = command("vhost-device-block").unwrap();
        command
            .arg(option("blk-file", uri))
            .arg("--socket-path=/nowhere/socket");
        let mut program = Program::spawn(&mut command).unwrap();
        assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(1));
        let log = program.stderr();
        assert!(log.contains("no local file") && log.contains(uri), "{log}");
        assert!(!log.contains("make an image"), "{log}");
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}

#[test]
fn an_image_that_begins_like_another_format_is_served_with_a_warning() {
    for arguments in [&[][..], &["--direct"]] {
        for (start, offset, name) in FORMATS {
            let mut contents = vec![0; IMAGE_SIZE];
            contents[offset..][..start.len()].copy_from_slice(start);
            let device = Variant::THREADS.start(&contents, arguments);
            let log = device.program.stderr();
            let warned: Vec<_> = log.lines().filter(|line| line.contains("warn: ")).collect();
            assert_eq!(warned.len(), 1, "{log}");
            assert!(
                warned[0].contains(name) && warned[0].contains("raw"),
                "{log}"
            );
            let mut disk = Disk::connect(device);
            let seen = ok(disk.driver.read(0, 512).unwrap());
            assert_same(&seen, &contents[..512], name);
        }
        for contents in [vec![0; 512], noise(3, IMAGE_SIZE)] {
            let arguments = arguments.iter().filter(|_| contents.len() > 512);
            let arguments: Vec<_> = arguments.copied().collect();
            let device = Variant::THREADS.start(&contents, &arguments);
            assert!(!device.program.stderr().contains("raw"));
        }
    }
}

/// All disks of a guest would look the same to it.
#[test]
fn each_image_has_a_serial_number_of_its_own_that_stays() {
    let (directory, first) = image(&[0; IMAGE_SIZE]);
    let second = directory.path().join("second");
    fs::write(&second, [0; IMAGE_SIZE]).unwrap();
    let linked = directory.path().join("linked");
    fs::hard_link(&first, &linked).unwrap();
    let serial = |path: &OsStr| {
        let sockets = tempfile::tempdir().unwrap();
        let socket = sockets.path().join("socket");
        let variant = Variant::THREADS;
        let command = variant.command(path.as_ref(), &socket, &[]);
        let mut disk = serve((command, socket, sockets), PathBuf::from(path));
        ok(disk.driver.get_id().unwrap())
    };
    let of_first = serial(first.as_os_str());
    assert_eq!(of_first.len(), 20);
    assert!(of_first.iter().all(u8::is_ascii_alphanumeric));
    assert_ne!(serial(second.as_os_str()), of_first);
    assert_eq!(serial(first.as_os_str()), of_first);
    assert_eq!(serial(linked.as_os_str()), of_first);
}

/// Returns the physical block size that the guest sees, in bytes.
fn physical_block(disk: &Disk) -> u64 {
    let block = disk.front_end.config(20, 4).unwrap();
    let block = u32::from_le_bytes(block.try_into().unwrap());
    let exponent = disk.front_end.config(24, 1).unwrap()[0];
    u64::from(block) << exponent
}

#[test]
fn the_physical_block_size_is_as_given() {
    for (arguments, expected) in [
        (&["--physical-block-size=512"][..], 512),
        (&["--physical-block-size=65536"], 65536),
        (
            &["--physical-block-size=8192", "--logical-block-size=4096"],
            8192,
        ),
    ] {
        let disk = Variant::THREADS.disk(&[0; IMAGE_SIZE], arguments);
        assert_eq!(physical_block(&disk), expected, "{arguments:?}");
    }
    let (_directory, path) = image(&[0; IMAGE_SIZE]);
    let arguments = ["--physical-block-size=512", "--logical-block-size=4096"];
    let socket = path.with_file_name("socket");
    let mut command = Variant::THREADS.command(&path, &socket, &arguments);
    let name = path.to_str().unwrap();
    let [physical, logical] = arguments;
    assert_refused(&mut command, &[name, physical, logical]);
}

/// A guest aligns partitions and file systems to it; 64 KiB, or 2 MiB, would waste space.
#[test]
fn the_physical_block_size_of_a_file_is_no_more_than_4096() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB;
    let Ok(memory) = memfd_create("huge", flags).map(File::from) else {
        return skip("this kernel has no huge pages");
    };
    assert!(memory.metadata().unwrap().blksize() > 4096);
    memory.set_len(4 << 20).unwrap();
    let disk = serve(inheriting(memory, &["--blk-fd=7"]), PathBuf::new());
    assert_eq!(physical_block(&disk), 4096);
}
