// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory tables and memory slots.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::front_end::memory::Region;
use vhost_device_tests::front_end::{Buffer, FrontEnd, GuestMemory, Options};
use vhost_device_tests::target::{Claim, Request, Target, assert_works, claims, skip};

use crate::{Message, Peer, assert_refused, assert_refused_after, start};

const PAGE: u64 = 4096;

/// The reply to GET_MAX_MEM_SLOTS, as of KVM and libvhost-user.
const SLOTS: u64 = 509;

/// Creates a table of `count` regions of a page each, with a hole after each.
fn table(count: u64) -> Message {
    changed("many regions", count, |_| {})
}

/// Creates such a table, and changes some fields of its regions.
fn changed(
    what: &'static str,
    count: u64,
    change: impl FnOnce(&mut [VhostUserMemoryRegionInfo]),
) -> Message {
    let regions = (0..count).map(|index| Arc::new(Region::new(index * 2 * PAGE, PAGE as usize)));
    let regions: Vec<_> = regions.collect();
    let mut infos: Vec<_> = regions.iter().map(|region| region.info()).collect();
    change(&mut infos);
    let mut message = Message::memory_table(what, &regions);
    message.payload = payload::memory_table(&infos);
    message
}

/// Invalid fields of a region.
type Change = (&'static str, fn(&mut VhostUserMemoryRegionInfo));

const CHANGES: [Change; 6] = [
    ("a region of no bytes", |region| region.memory_size = 0),
    ("a file shorter than its region", |region| {
        region.memory_size = 2 * PAGE
    }),
    ("an offset past the end of the file", |region| {
        region.mmap_offset = PAGE
    }),
    ("guest addresses that overflow", |region| {
        region.guest_phys_addr = u64::MAX - PAGE + 2
    }),
    ("user addresses that overflow", |region| {
        region.userspace_addr = u64::MAX - PAGE + 2
    }),
    ("an offset that overflows", |region| {
        region.mmap_offset = u64::MAX - PAGE + 1
    }),
];

/// Returns files that cannot be used as memory: one that cannot be mapped, and one that cannot be written.
fn wrong_files() -> [(&'static str, OwnedFd); 2] {
    let memfd = Region::new(0, PAGE as usize);
    let path = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(memfd.file())
    );
    [
        ("a pipe", std::io::pipe().unwrap().0.into()),
        (
            "a file that is only readable",
            File::open(path).unwrap().into(),
        ),
    ]
}

fn a_table_of_as_many_regions_as_front_ends_send_is_accepted(target: &dyn Target) {
    let (_running, peer) = start(target);
    for count in [1, 2, 8, 32, 1] {
        let table = table(count);
        peer.deliver(&table);
    }
}

fn a_malformed_table_is_refused(target: &dyn Target) {
    let tables = |_: &Peer| {
        let mut bad = vec![
            changed("overlapping regions", 2, |regions| {
                regions[1].guest_phys_addr = regions[0].guest_phys_addr + PAGE / 2
            }),
            changed("the same region twice", 2, |regions| {
                regions[1].guest_phys_addr = regions[0].guest_phys_addr
            }),
            Message::new("nothing", FrontendReq::SET_MEM_TABLE, Vec::new()),
            Message::new(
                "half a header",
                FrontendReq::SET_MEM_TABLE,
                vec![1, 0, 0, 0],
            ),
        ];
        bad.extend(
            CHANGES.map(|(what, change)| changed(what, 1, |regions| change(&mut regions[0]))),
        );
        let mut missing = changed("more regions than it holds", 1, |_| {});
        missing.payload[0] = 2;
        bad.push(missing);
        let mut billions = changed("4294967295 regions", 1, |_| {});
        billions.payload[..4].fill(0xff);
        bad.push(billions);
        let mut no_file = changed("no file", 1, |_| {});
        no_file.files.clear();
        bad.push(no_file);
        let mut one_file = changed("a file for one of two regions", 2, |_| {});
        one_file.files.pop();
        bad.push(one_file);
        bad.extend(wrong_files().map(|(what, file)| {
            let mut table = changed(what, 1, |_| {});
            table.files = vec![file];
            table
        }));
        bad
    };
    // `vhost-user-backend` accepts everything that the kernel can map, whatever the file and the user addresses.
    if target.claims(Claim::RingChecks) {
        assert_refused(target, tables);
    }
}

/// As User-Mode Linux sends it. Only room for whole regions is accepted.
fn a_table_may_be_padded_for_more_regions(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let (_running, peer) = start(target);
    for room in [32, 64] {
        let mut table = table(2);
        table.payload.resize(table.payload.len() + room, 0);
        peer.deliver(&table);
    }
    assert_refused(target, |_| {
        let mut table = changed("a byte more than its regions", 1, |_| {});
        table.payload.push(0);
        vec![table]
    });
}

/// Whether the back-end accepts it or not, the connection or the next one continues.
fn a_table_of_no_regions_does_no_harm(target: &dyn Target) {
    let (running, peer) = start(target);
    let _ = peer.acknowledged(FrontendReq::SET_MEM_TABLE, &payload::memory_table(&[]), &[]);
    if target.claims(Claim::Refusal) {
        peer.assert_alive();
    }
    drop(peer);
    Peer::new(&running);
}

/// More than front-ends send, up to the largest message whose files the kernel passes, and beyond.
fn a_table_of_more_regions_than_front_ends_send_does_no_harm(target: &dyn Target) {
    let running = target.start();
    for (count, files) in [
        (33, 33),
        (64, 64),
        (127, 127),
        (128, 128),
        (129, 129),
        (250, 250),
    ] {
        let peer = Peer::new(&running);
        let mut table = table(count);
        table.files.truncate(files);
        let _ = peer.offer(&table);
    }
    // More files than the table has regions.
    let peer = Peer::new(&running);
    let mut few = table(2);
    few.files = table(250).files;
    let _ = peer.offer(&few);
    drop(peer);
    Peer::new(&running).assert_alive();
}

/// Two ranges of guest addresses with the same memory.
fn two_regions_may_share_their_memory(target: &dyn Target) {
    let running = target.start();
    let options = Options {
        memory: vec![(0, 1 << 20)],
        ..Options::default()
    };
    let front_end = running.connect_with(&options);
    let first = front_end.memory().regions()[0].info();
    let mut second = first;
    second.guest_phys_addr += 1 << 30;
    second.userspace_addr += 1 << 40;
    let file = front_end.memory().regions()[0].file().as_fd();
    let raw = front_end.raw().unwrap();
    let table = payload::memory_table(&[first, second]);
    raw.acknowledged(FrontendReq::SET_MEM_TABLE, &table, &[file, file])
        .unwrap();
    let mut queue = front_end.queue(0, 16).unwrap();
    let mut request = Request::new(target, front_end.memory());
    let buffers = request.write(1).map(|buffer| {
        let address = buffer.address + (1 << 30);
        Buffer { address, ..buffer }
    });
    queue.submit(&buffers);
    request.finish(&mut queue);
}

/// Runs a request in memory whose file offset is not a multiple of the page size; a back-end that cannot map it refuses it.
fn a_region_that_starts_inside_a_page_of_its_file_is_served_or_refused(target: &dyn Target) {
    if !claims(target, Claim::Refusal) {
        return;
    }
    const SHIFT: u64 = 0x810;
    let running = target.start();
    let front_end = FrontEnd::connect(
        &running.socket,
        &Options {
            memory: vec![(0, 1 << 20)],
            ..Options::default()
        },
    )
    .unwrap();
    // The same memory without its first bytes.
    let mut info = front_end.memory().regions()[0].info();
    info.guest_phys_addr += SHIFT;
    info.userspace_addr += SHIFT;
    info.mmap_offset += SHIFT;
    info.memory_size -= SHIFT;
    let raw = front_end.raw().unwrap();
    let file = front_end.memory().regions()[0].file();
    if raw
        .acknowledged(
            FrontendReq::SET_MEM_TABLE,
            &payload::memory_table(&[info]),
            &[file.as_fd()],
        )
        .unwrap()
        != 0
    {
        return;
    }
    front_end.memory().allocate(SHIFT, 1);
    let mut queue = front_end.queue(0, 16).unwrap();
    assert_works(target, front_end.memory(), &mut queue);
}

/// Allows the host to allocate huge pages until this is dropped, if this is root.
struct HugePages {
    /// The previous setting.
    before: Option<String>,
    /// Other tests wait for this.
    _lock: File,
}

impl HugePages {
    const LIMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";

    fn allow() -> Self {
        let lock = File::create(std::env::temp_dir().join("vhost-device-huge-pages")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let before = fs::read_to_string(Self::LIMIT).ok();
        Self {
            before: before.filter(|_| fs::write(Self::LIMIT, "16").is_ok()),
            _lock: lock,
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(Self::LIMIT, before);
        }
    }
}

/// QEMU leaves holes in the first MiB, at any address. A mapping cannot.
fn a_region_that_starts_inside_a_huge_page_is_served(target: &dyn Target) {
    const HOLE: u64 = 0xa0000;
    const START: u64 = 0xc0000;
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let _pages = HugePages::allow();
    let Some(huge) = Region::huge(0, 2 << 20) else {
        return skip(target, "huge pages, nor does this host");
    };
    let running = target.start();
    let mut memory = GuestMemory::default();
    let huge = memory.add(huge);
    let options = Options::default();
    let front_end = FrontEnd::connect_with_memory(&running.socket, &options, memory).unwrap();
    let mut low = huge.info();
    low.memory_size = HOLE;
    let mut high = huge.info();
    high.guest_phys_addr += START;
    high.userspace_addr += START;
    high.mmap_offset += START;
    high.memory_size -= START;
    let file = huge.file().as_fd();
    let table = payload::memory_table(&[low, high]);
    let raw = front_end.raw().unwrap();
    let answer = raw.acknowledged(FrontendReq::SET_MEM_TABLE, &table, &[file, file]);
    assert_eq!(answer.unwrap(), 0, "memory that begins inside a huge page");
    front_end.memory().allocate(START, 1);
    let mut queue = front_end.queue(0, 16).unwrap();
    assert_works(target, front_end.memory(), &mut queue);
}

/// Persistent memory is a character device without a size: /dev/dax.
fn a_region_of_a_character_device_is_mapped(target: &dyn Target) {
    let (_running, peer) = start(target);
    let device = File::options().read(true).write(true).open("/dev/zero");
    let device = device.unwrap();
    let mut region = Region::new(0, PAGE as usize).info();
    region.mmap_offset = 0;
    peer.done(
        FrontendReq::SET_MEM_TABLE,
        &payload::memory_table(&[region]),
        &[device.as_fd()],
    );
}

/// The previous table stays in force.
fn a_refused_table_leaves_the_old_one_in_place(target: &dyn Target) {
    if !claims(target, Claim::Refusal) {
        return;
    }
    let running = target.start();
    let front_end = running.connect();
    let mut queue = front_end.queue(0, 16).unwrap();
    let bad = changed("overlapping regions", 2, |regions| {
        regions[1].guest_phys_addr = regions[0].guest_phys_addr
    });
    assert_ne!(
        front_end
            .raw()
            .unwrap()
            .acknowledged(bad.request, &bad.payload, &bad.fds())
            .unwrap(),
        0
    );
    assert_works(target, front_end.memory(), &mut queue);
}

fn has_slots(peer: &Peer, target: &dyn Target) -> bool {
    peer.has(ProtocolFeatures::CONFIGURE_MEM_SLOTS, target)
}

/// Returns region `index`, of a page each, all in one file.
fn slot(file: &Region, index: u64) -> VhostUserMemoryRegionInfo {
    let mut info = file.info();
    info.guest_phys_addr = index * 2 * PAGE;
    info.userspace_addr += index * PAGE;
    info.mmap_offset = index * PAGE;
    info.memory_size = PAGE;
    info
}

fn as_many_regions_as_there_are_slots_can_be_added(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !has_slots(&peer, target) {
        return;
    }
    assert_eq!(
        peer.ask(FrontendReq::GET_MAX_MEM_SLOTS, &[]),
        payload::u64(SLOTS)
    );
    let memory = Region::new(0, ((SLOTS + 1) * PAGE) as usize);
    let fds = [memory.file().as_fd()];
    let add = |index| {
        peer.acknowledged(
            FrontendReq::ADD_MEM_REG,
            &payload::single_region(&slot(&memory, index)),
            &fds,
        )
    };
    for index in 0..SLOTS {
        assert_eq!(add(index).unwrap(), 0, "region {index}");
    }
    if !claims(target, Claim::Refusal) {
        return;
    }
    assert_ne!(add(SLOTS).unwrap(), 0, "one more than there are slots");
    peer.done(
        FrontendReq::REM_MEM_REG,
        &payload::single_region(&slot(&memory, 0)),
        &[],
    );
    assert_eq!(add(SLOTS).unwrap(), 0, "after another was removed");
}

/// A removed region is identified by its addresses and size; a file that is sent with it is unused.
fn a_region_is_removed_whatever_its_offset(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !has_slots(&peer, target) {
        return;
    }
    let memory = Region::new(0, 8 * PAGE as usize);
    let fds = [memory.file().as_fd()];
    for fds_with_removal in [&[][..], &fds] {
        let mut info = slot(&memory, 3);
        peer.done(
            FrontendReq::ADD_MEM_REG,
            &payload::single_region(&info),
            &fds,
        );
        info.mmap_offset = 0;
        peer.done(
            FrontendReq::REM_MEM_REG,
            &payload::single_region(&info),
            fds_with_removal,
        );
    }
    peer.assert_alive();
}

/// Adds the region that the changed ones are next to. This process maps nothing at its user addresses, so that these are
/// no reason to refuse the changed ones.
fn add_first_slot(peer: &Peer) {
    let memory = Region::new(0, PAGE as usize);
    let mut info = memory.info();
    info.userspace_addr = PAGE;
    let payload = payload::single_region(&info);
    peer.done(FrontendReq::ADD_MEM_REG, &payload, &[memory.file().as_fd()]);
}

fn a_malformed_region_is_refused(target: &dyn Target) {
    if !has_slots(&Peer::new(&target.start()), target) || !claims(target, Claim::RingChecks) {
        return;
    }
    let region = || Region::new(4 * PAGE, PAGE as usize);
    let (running, peer) = start(target);
    add_first_slot(&peer);
    let good = region();
    peer.done(
        FrontendReq::ADD_MEM_REG,
        &payload::single_region(&good.info()),
        &[good.file().as_fd()],
    );
    drop(peer);
    drop(running);

    assert_refused_after(target, add_first_slot, |_| {
        let region = region();
        let file = || region.file().try_clone().unwrap();
        let add = |what, change: &dyn Fn(&mut VhostUserMemoryRegionInfo)| {
            let mut info = region.info();
            change(&mut info);
            Message::new(
                what,
                FrontendReq::ADD_MEM_REG,
                payload::single_region(&info),
            )
        };
        let mut bad: Vec<_> = CHANGES
            .iter()
            .map(|(what, change)| add(what, change).with(file()))
            .collect();
        bad.push(add("an address in use", &|info| info.guest_phys_addr = 0).with(file()));
        bad.push(
            add("an address just in use", &|info| {
                info.guest_phys_addr = PAGE / 2
            })
            .with(file()),
        );
        bad.push(add("no file", &|_| {}));
        bad.extend(wrong_files().map(|(what, file)| add(what, &|_| {}).with(file)));
        let mut short = add("half a region", &|_| {}).with(file());
        short.payload.truncate(24);
        bad.push(short);
        bad
    });
}

fn a_region_that_was_not_added_cannot_be_removed(target: &dyn Target) {
    if !has_slots(&Peer::new(&target.start()), target) || !claims(target, Claim::RingChecks) {
        return;
    }
    let memory = Region::new(0, PAGE as usize);
    let add = |peer: &Peer| {
        let payload = payload::single_region(&memory.info());
        peer.done(FrontendReq::ADD_MEM_REG, &payload, &[memory.file().as_fd()]);
    };
    assert_refused_after(target, add, |_| {
        let remove = |what, change: fn(&mut VhostUserMemoryRegionInfo)| {
            let mut info = memory.info();
            change(&mut info);
            Message::new(
                what,
                FrontendReq::REM_MEM_REG,
                payload::single_region(&info),
            )
        };
        vec![
            remove("another guest address", |info| info.guest_phys_addr += PAGE),
            remove("another user address", |info| info.userspace_addr += PAGE),
            remove("another size", |info| info.memory_size *= 2),
            remove("no size", |info| info.memory_size = 0),
        ]
    });
}

fn requests_in_memory_that_was_added_are_carried_out(target: &dyn Target) {
    let running = target.start();
    if !has_slots(&Peer::new(&running), target) {
        return;
    }
    let options = Options::with_slots(1 << 20);
    let mut front_end = running.connect_with(&options);
    let mut queue = front_end.queue(0, 16).unwrap();
    for round in 0..3 {
        let address = 1 << 32 | round << 24;
        front_end.add_region(address, 1 << 16).unwrap();
        // The ring stays where it is; the request lies in what was added.
        let added = front_end.memory().without(0);
        let mut request = Request::new(target, &added);
        request.run(&mut queue, round as u32);
        front_end.remove_region(address).unwrap();
    }
}

crate::for_each_target![
    a_table_of_as_many_regions_as_front_ends_send_is_accepted,
    a_malformed_table_is_refused,
    a_table_may_be_padded_for_more_regions,
    a_table_of_no_regions_does_no_harm,
    a_table_of_more_regions_than_front_ends_send_does_no_harm,
    two_regions_may_share_their_memory,
    a_region_that_starts_inside_a_page_of_its_file_is_served_or_refused,
    a_region_that_starts_inside_a_huge_page_is_served,
    a_region_of_a_character_device_is_mapped,
    a_refused_table_leaves_the_old_one_in_place,
    as_many_regions_as_there_are_slots_can_be_added,
    a_region_is_removed_whatever_its_offset,
    a_malformed_region_is_refused,
    a_region_that_was_not_added_cannot_be_removed,
    requests_in_memory_that_was_added_are_carried_out,
];
