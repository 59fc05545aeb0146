// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that fail: the status of each, and that nothing else happens.

#![allow(unsafe_code)]

use std::os::unix::process::CommandExt;

use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::block::{
    DISCARD, FLUSH, GET_ID, HEADER_SIZE, ID_SIZE, IN, IOERR, NO_STATUS, OK, OUT, Request,
    SECTOR_SIZE, UNMAP, UNSUPP, WRITE_ZEROES, segment,
};

use crate::config::{discard_limits, write_zeroes_limits};
use crate::{
    Device, Disk, IMAGE_SIZE, SECTORS, UNTOUCHED, Variant, assert_failed, assert_same, noise, ok,
};

/// Types that are not offered, not for drivers, or undefined.
const UNKNOWN: [u32; 14] = [
    2,
    3,
    5,
    6,
    7,
    9,
    10,
    12,
    14,
    15,
    16,
    IN | 1 << 31,
    OUT | 1 << 31,
    u32::MAX,
];

/// Ranges that are not, or not completely, on the disk: sector and length.
const OUTSIDE: [(u64, u32); 9] = [
    (SECTORS, 512),
    (SECTORS - 1, 1024),
    (SECTORS + 1, 512),
    (1, SECTORS as u32 * 512),
    (u64::MAX, 512),
    (u64::MAX, 1024),
    (u64::MAX / 512, 512),
    // These are multiples of 2^64 in bytes, or just before one.
    (1 << 55, 512),
    ((1 << 55) - 1, 512),
];

/// Runs the requests on a disk that must not change, and checks the status of each.
fn assert_each_fails(variant: Variant, arguments: &[&str], requests: &[(String, Request, u32)]) {
    let image = noise(1, IMAGE_SIZE);
    let mut disk = variant.disk(&image, arguments);
    for (what, request, status) in requests {
        let completion = disk.driver.request(request).unwrap();
        assert_failed(&completion, *status, what);
    }
    disk.assert_contents(&image);
}

fn reads_and_writes_outside_the_disk_fail(variant: Variant) {
    let data = vec![7; IMAGE_SIZE];
    let requests: Vec<_> = OUTSIDE
        .iter()
        .flat_map(|&(sector, length)| {
            let read = Request {
                kind: IN,
                sector,
                reply_length: length,
                ..Default::default()
            };
            let write = Request {
                kind: OUT,
                sector,
                data: &data[..length as usize],
                ..Default::default()
            };
            let what = format!("{length} bytes at sector {sector}");
            [
                (format!("read of {what}"), read, IOERR),
                (format!("write of {what}"), write, IOERR),
            ]
        })
        .collect();
    assert_each_fails(variant, &[], &requests);
}

fn reads_and_writes_of_parts_of_sectors_fail(variant: Variant) {
    let data = [7; 4097];
    let requests: Vec<_> = [1, 16, 511, 513, 1000, 4095, 4097]
        .iter()
        .flat_map(|&length| {
            let read = Request {
                kind: IN,
                reply_length: length,
                ..Default::default()
            };
            let write = Request {
                kind: OUT,
                data: &data[..length as usize],
                ..Default::default()
            };
            [
                (format!("read of {length} bytes"), read, IOERR),
                (format!("write of {length} bytes"), write, IOERR),
            ]
        })
        .collect();
    assert_each_fails(variant, &[], &requests);
}

fn bytes_after_the_last_whole_block_cannot_be_reached(variant: Variant) {
    let image = noise(2, 2 * 4096 + 1024);
    let mut disk = variant.disk(&image, &["--logical-block-size=4096"]);
    ok(disk.driver.read(8, 4096).unwrap());
    assert_failed(&disk.driver.read(16, 512).unwrap(), IOERR, "read");
    assert_failed(&disk.driver.write(16, &[7; 512]).unwrap(), IOERR, "write");
    assert_failed(&disk.driver.discard(16, 1).unwrap(), IOERR, "discard");
    assert_same(&disk.device.contents(), &image, "the image on the host");
}

fn nothing_writes_to_a_read_only_disk(variant: Variant) {
    let data = [7; 4096];
    let range = segment(0, 8, 0);
    let unmap = segment(0, 8, UNMAP);
    let writes = [
        ("write", OUT, &data[..]),
        ("write of a sector", OUT, &data[..512]),
        ("discard", DISCARD, &range),
        ("write-zeroes", WRITE_ZEROES, &range),
        ("write-zeroes with unmap", WRITE_ZEROES, &unmap),
    ]
    .map(|(what, kind, data)| {
        let request = Request {
            kind,
            data,
            ..Default::default()
        };
        (what.to_owned(), request, IOERR)
    });
    for discard in ["--discard=unmap", "--discard=ignore"] {
        assert_each_fails(variant, &["--read-only", discard], &writes);
    }
}

fn unknown_requests_are_unsupported(variant: Variant) {
    let data = [7; 4096];
    for arguments in [&[][..], &["--read-only"]] {
        let requests: Vec<_> = UNKNOWN
            .iter()
            .flat_map(|&kind| {
                let bare = Request {
                    kind,
                    ..Default::default()
                };
                let full = Request {
                    data: &data,
                    reply_length: 512,
                    ..bare
                };
                [bare, full].map(|request| (format!("request {kind:#x}"), request, UNSUPP))
            })
            .collect();
        assert_each_fails(variant, arguments, &requests);
    }
}

fn unknown_flags_of_segments_are_unsupported(variant: Variant) {
    let mut cases = vec![(DISCARD, UNMAP)];
    for kind in [DISCARD, WRITE_ZEROES] {
        cases.extend((1..32).map(|bit| (kind, 1 << bit)));
        cases.extend([(kind, u32::MAX), (kind, UNMAP | 1 << 31)]);
    }
    let cases: Vec<_> = cases
        .into_iter()
        .map(|(kind, flags)| (kind, flags, segment(0, 8, flags)))
        .collect();
    let requests: Vec<_> = cases
        .iter()
        .map(|(kind, flags, data)| {
            let request = Request {
                kind: *kind,
                data,
                ..Default::default()
            };
            (
                format!("request {kind} with flags {flags:#x}"),
                request,
                UNSUPP,
            )
        })
        .collect();
    for argument in ["--discard=unmap", "--discard=ignore"] {
        assert_each_fails(variant, &[argument], &requests);
    }
}

fn discards_and_write_zeroes_without_whole_segments_fail(variant: Variant) {
    let segments = segment(0, 8, 0).repeat(17);
    for kind in [DISCARD, WRITE_ZEROES] {
        let requests: Vec<_> = [0, 1, 8, 15, 17, 31, 33, 16 * 16 + 1, 17 * 16]
            .iter()
            .map(|&length| {
                let request = Request {
                    kind,
                    data: &segments[..length],
                    ..Default::default()
                };
                (format!("request {kind} of {length} bytes"), request, IOERR)
            })
            .collect();
        for argument in ["--discard=unmap", "--discard=ignore"] {
            assert_each_fails(variant, &[argument], &requests);
        }
    }
}

fn discards_and_write_zeroes_outside_the_disk_fail(variant: Variant) {
    let ranges: Vec<_> = OUTSIDE
        .iter()
        .map(|&(sector, length)| segment(sector, length / SECTOR_SIZE as u32, 0))
        .collect();
    for kind in [DISCARD, WRITE_ZEROES] {
        let requests: Vec<_> = ranges
            .iter()
            .map(|range| {
                let request = Request {
                    kind,
                    data: range,
                    ..Default::default()
                };
                (format!("request {kind} of {range:x?}"), request, IOERR)
            })
            .collect();
        for argument in ["--discard=unmap", "--discard=ignore"] {
            assert_each_fails(variant, &[argument], &requests);
        }
    }
}

/// Each in turn among 15 valid ones.
fn one_bad_segment_fails_the_whole_request(variant: Variant) {
    for (bad, status) in [
        (segment(SECTORS, 1, 0), IOERR),
        (segment(u64::MAX, u32::MAX, 0), IOERR),
        (segment(0, SECTORS as u32 + 1, 0), IOERR),
        (segment(0, 8, 2), UNSUPP),
    ] {
        let lists: Vec<_> = (0..16)
            .map(|position| {
                let mut list: Vec<_> = (0..16).map(|index| segment(index * 8, 8, 0)).collect();
                list[position] = bad;
                list.concat()
            })
            .collect();
        let requests: Vec<_> = [DISCARD, WRITE_ZEROES]
            .iter()
            .flat_map(|&kind| {
                lists.iter().map(move |data| {
                    let request = Request {
                        kind,
                        data,
                        ..Default::default()
                    };
                    (format!("request {kind} of {data:x?}"), request, status)
                })
            })
            .collect();
        assert_each_fails(variant, &[], &requests);
    }
}

/// A sparse disk on which segments of any allowed length have room.
fn segments_may_be_as_long_as_the_config_space_says_and_no_longer(variant: Variant) {
    let directory = variant.directory();
    let file = std::fs::File::create_new(directory.path().join("image")).unwrap();
    file.set_len(4 << 30).unwrap();
    let mut disk = Disk::connect(variant.start_in(directory, &[], |_| {}));
    let discard = discard_limits(&disk.front_end).sectors;
    let write_zeroes = write_zeroes_limits(&disk.front_end).sectors;
    assert!(discard < 8 << 20 && write_zeroes < 8 << 20);
    ok(disk.driver.discard(0, discard).unwrap());
    ok(disk.driver.write_zeroes(0, write_zeroes, UNMAP).unwrap());
    for (limit, what) in [(discard, "discard"), (write_zeroes, "write-zeroes")] {
        for sectors in [limit + 1, u32::MAX] {
            let completion = if what == "discard" {
                disk.driver.discard(0, sectors)
            } else {
                disk.driver.write_zeroes(0, sectors, 0)
            };
            assert_failed(&completion.unwrap(), IOERR, &format!("{what} of {sectors}"));
        }
    }
}

fn a_header_that_is_too_short_is_an_error(variant: Variant) {
    let image = noise(3, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    for kind in [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES] {
        for length in 0..HEADER_SIZE {
            let mut prepared = disk.driver.prepare(&Request {
                kind,
                reply_length: 512,
                ..Default::default()
            });
            prepared.chain[0].length = length;
            if length == 0 {
                prepared.chain.remove(0);
            }
            let completion = disk.driver.run(&prepared).unwrap();
            let what = format!("request {kind} with {length} bytes of header");
            assert_failed(&completion, IOERR, &what);
        }
    }
    disk.assert_contents(&image);
}

fn a_request_without_room_for_a_status_is_given_back_empty(variant: Variant) {
    let image = noise(4, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    let data = segment(0, 8, 0).repeat(32);
    for kind in [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99] {
        let data = match kind {
            OUT => &data[..],
            DISCARD | WRITE_ZEROES => &data[..16],
            _ => &[],
        };
        let request = Request {
            kind,
            data,
            ..Default::default()
        };
        let mut none = disk.driver.prepare(&request);
        none.chain.pop();
        let mut empty = disk.driver.prepare(&request);
        let status = empty.chain.pop().unwrap();
        empty.chain.push(Buffer {
            length: 0,
            ..status
        });
        for prepared in [none, empty] {
            let completion = disk.driver.run(&prepared).unwrap();
            assert_eq!(completion.length, 0, "used length of request {kind}");
            assert_eq!(completion.status, NO_STATUS);
        }
    }
    disk.assert_contents(&image);
}

fn too_little_room_for_the_serial_number_is_an_error(variant: Variant) {
    let requests: Vec<_> = (0..ID_SIZE as u32)
        .map(|reply_length| {
            let request = Request {
                kind: GET_ID,
                reply_length,
                ..Default::default()
            };
            let what = format!("GET_ID with {reply_length} bytes of room");
            (what, request, IOERR)
        })
        .collect();
    assert_each_fails(variant, &[], &requests);
}

/// A read needs a writable buffer, and a write a readable one.
fn data_in_the_wrong_direction_is_an_error(variant: Variant) {
    let requests = [
        (
            "read with readable data".to_owned(),
            Request {
                kind: IN,
                data: &[7; 512],
                ..Default::default()
            },
            IOERR,
        ),
        (
            "write with writable data".to_owned(),
            Request {
                kind: OUT,
                reply_length: 512,
                ..Default::default()
            },
            IOERR,
        ),
        (
            "discard with writable segments".to_owned(),
            Request {
                kind: DISCARD,
                reply_length: 16,
                ..Default::default()
            },
            IOERR,
        ),
        (
            "write-zeroes with writable segments".to_owned(),
            Request {
                kind: WRITE_ZEROES,
                reply_length: 16,
                ..Default::default()
            },
            IOERR,
        ),
        (
            "GET_ID with a readable buffer".to_owned(),
            Request {
                kind: GET_ID,
                data: &[7; ID_SIZE],
                ..Default::default()
            },
            IOERR,
        ),
    ];
    assert_each_fails(variant, &[], &requests);
}

fn reads_past_the_end_of_an_image_that_shrank_fail(variant: Variant) {
    let image = noise(5, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    let half = SECTORS / 2;
    disk.device.file().set_len(IMAGE_SIZE as u64 / 2).unwrap();
    for (sector, length) in [
        (half, 512),
        (SECTORS - 1, 512),
        (half - 1, 1024),
        (0, 1 << 20),
    ] {
        let completion = disk.driver.read(sector, length).unwrap();
        assert_eq!(
            u32::from(completion.status),
            IOERR,
            "read of {length} bytes at sector {sector}"
        );
        // Whatever was there may have been read; no data may be invented.
        let start = sector as usize * SECTOR_SIZE;
        let rest = &image[start..];
        for (index, (&seen, &written)) in completion.data.iter().zip(rest).enumerate() {
            let exists = start + index < IMAGE_SIZE / 2;
            assert!(
                seen == UNTOUCHED || exists && seen == written,
                "{seen:#x} at byte {index} of {length} at sector {sector}"
            );
        }
    }
    assert_same(
        &ok(disk.driver.read(half - 1, 512).unwrap()),
        &image[IMAGE_SIZE / 2 - 512..IMAGE_SIZE / 2],
        "data",
    );
    // Once it has its length again, all requests succeed.
    disk.device.file().set_len(IMAGE_SIZE as u64).unwrap();
    assert_eq!(ok(disk.driver.read(half, 512).unwrap()), [0; 512]);
}

/// A limit with a signal (SIGXFSZ) allows writes to the first half of the image only.
fn writes_that_the_host_refuses_fail(variant: Variant) {
    let mut image = noise(6, IMAGE_SIZE);
    let directory = variant.directory();
    std::fs::write(directory.path().join("image"), &image).unwrap();
    let limit = libc::rlimit {
        rlim_cur: IMAGE_SIZE as u64 / 2,
        rlim_max: IMAGE_SIZE as u64 / 2,
    };
    let refuse = move || {
        // SAFETY: the call reads a valid limit, and touches no other memory.
        if unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    let device: Device = variant.start_in(directory, &[], |command| {
        // SAFETY: the closure makes async-signal-safe system calls only, and allocates nothing.
        unsafe { command.pre_exec(refuse) };
    });
    let mut disk = Disk::connect(device);
    let half = SECTORS / 2;
    let completion = disk.driver.write(half, &[7; 4096]).unwrap();
    assert_failed(&completion, IOERR, "a write that is refused");
    disk.assert_contents(&image);
    // Part of this one may be written.
    let completion = disk.driver.write(half - 8, &[7; 8192]).unwrap();
    assert_failed(&completion, IOERR, "a write that is refused in part");
    // All others continue.
    image[..4096].fill(8);
    ok(disk.driver.write(0, &[8; 4096]).unwrap());
    let data = ok(disk.driver.read(0, 4096).unwrap());
    assert_same(&data, &image[..4096], "data");
}

/// A device that has failed many requests still serves others, and has not logged each failure.
fn many_failing_requests_do_no_harm(variant: Variant) {
    let mut disk = variant.disk(&vec![0; IMAGE_SIZE], &[]);
    disk.device.file().set_len(512).unwrap();
    for _ in 0..2000 {
        let completion = disk.driver.read(8, 512).unwrap();
        assert_failed(&completion, IOERR, "read past the end");
    }
    let completion = disk.driver.read(0, 512).unwrap();
    assert_eq!(u32::from(completion.status), OK);
    let lines = disk.device.program.stderr().lines().count();
    assert!(lines < 200, "{lines} lines were logged");
}

crate::for_each_variant!(
    reads_and_writes_outside_the_disk_fail,
    reads_and_writes_of_parts_of_sectors_fail,
    bytes_after_the_last_whole_block_cannot_be_reached,
    nothing_writes_to_a_read_only_disk,
    unknown_requests_are_unsupported,
    unknown_flags_of_segments_are_unsupported,
    discards_and_write_zeroes_without_whole_segments_fail,
    discards_and_write_zeroes_outside_the_disk_fail,
    one_bad_segment_fails_the_whole_request,
    segments_may_be_as_long_as_the_config_space_says_and_no_longer,
    a_header_that_is_too_short_is_an_error,
    a_request_without_room_for_a_status_is_given_back_empty,
    too_little_room_for_the_serial_number_is_an_error,
    data_in_the_wrong_direction_is_an_error,
    reads_past_the_end_of_an_image_that_shrank_fail,
    writes_that_the_host_refuses_fail,
    many_failing_requests_do_no_harm,
);
