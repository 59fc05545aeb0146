// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Half of a chain: segments of mapped guest memory, which are read or written from the front, and whose head and tail can be split off.
//! Only this file of the module turns pointers into memory.

#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use vm_memory::VolatileSlice;

use super::ChainError;

/// A segment of guest memory, in the layout of the kernel's `struct iovec`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length; memory is only accessed through it by volatile operations or by the kernel.
unsafe impl Send for Segment {}

/// Most iovecs of one call of [`Segments::write_to`] and [`Segments::read_from`] if the call takes only a part of the bytes in view.
const PARTS: usize = 32;
/// Most iovecs of one call of [`Parts::read`].
const MANY: usize = 64;

impl Segment {
    /// Returns a segment for bytes that are not guest memory.
    fn hole(length: usize) -> Self {
        Self(libc::iovec {
            iov_base: ptr::null_mut(),
            iov_len: length,
        })
    }

    fn is_hole(&self) -> bool {
        self.0.iov_base.is_null()
    }

    fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Splits the segment in two at offset `at`, which is at most its length.
    fn split(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len());
        let piece = |start: usize, length| {
            Self(libc::iovec {
                iov_base: if self.is_hole() {
                    ptr::null_mut()
                } else {
                    self.0.iov_base.wrapping_byte_add(start)
                },
                iov_len: length,
            })
        };
        (piece(0, at), piece(at, self.len() - at))
    }

    /// Returns the segment with the `count` bytes before it, from which it was split.
    fn with_front(self, count: usize) -> Self {
        Self(libc::iovec {
            iov_base: self.0.iov_base.wrapping_byte_sub(count),
            iov_len: self.len() + count,
        })
    }
}

/// Both halves of a chain.
#[derive(Debug, Default)]
pub(crate) struct Halves {
    pub readable: Segments,
    pub writable: Segments,
}

/// The readable or the writable bytes of a chain.
///
/// Reads and writes consume bytes from the front. [`Segments::split_tail`] splits off bytes at the end, such as a status after the data,
/// and [`Segments::split_head`] bytes at the front, such as a response before the data.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    /// Consumed segments and the head, then those in view, then the tail.
    list: Vec<Segment>,
    /// The head, which is before those in view.
    head: Range<usize>,
    start: usize,
    /// Bytes that were consumed of the first segment in view, and that it no longer contains.
    cut: usize,
    end: usize,
    /// Bytes in view.
    length: u64,
    holes: bool,
}

impl Segments {
    /// Storage that is kept for the next chain has room for at most this many segments.
    const KEPT_CAPACITY: usize = 256;

    /// Removes all segments. The storage stays, for the next chain.
    pub fn clear(&mut self) {
        self.list.clear();
        self.list.shrink_to(Self::KEPT_CAPACITY);
        *self = Self {
            list: std::mem::take(&mut self.list),
            ..Self::default()
        };
    }

    /// Adds a segment of guest memory at the end. The caller keeps it mapped: a [`super::Chain`] holds the memory of its segments.
    pub(crate) fn push(&mut self, memory: &VolatileSlice<'_>) {
        self.append(Segment(libc::iovec {
            iov_base: memory.ptr_guard_mut().as_ptr().cast(),
            iov_len: memory.len(),
        }));
    }

    /// Adds bytes that are not guest memory at the end.
    pub(crate) fn push_hole(&mut self, length: usize) {
        self.holes = true;
        self.append(Segment::hole(length));
    }

    fn append(&mut self, segment: Segment) {
        self.length += segment.len() as u64;
        self.list.push(segment);
        self.end = self.list.len();
    }

    /// Returns the number of bytes in view: those not yet consumed, and not split off.
    #[inline]
    pub fn len(&self) -> u64 {
        self.length
    }

    fn need(&self, need: u64) -> Result<(), ChainError> {
        let have = self.length;
        if have < need {
            return Err(ChainError::TooShort { have, need });
        }
        Ok(())
    }

    /// Consumes `length` bytes from the front, and passes each part of them to `each` with its offset.
    fn consume(
        &mut self,
        length: u64,
        mut each: impl FnMut(usize, VolatileSlice<'_>),
    ) -> Result<(), ChainError> {
        self.need(length)?;
        // The bytes in view are mapped, so their number fits.
        let length = length as usize;
        let mut done = 0;
        while done < length {
            let Some(segment) = self.list.get_mut(self.start) else {
                break;
            };
            let (front, rest) = segment.split(length - done);
            each(done, volatile(&front)?);
            done += front.len();
            self.length -= front.len() as u64;
            if rest.len() == 0 {
                *segment = front.with_front(self.cut);
                self.cut = 0;
                self.start += 1;
            } else {
                *segment = rest;
                self.cut += front.len();
            }
        }
        Ok(())
    }

    /// Moves past `length` bytes.
    pub fn skip(&mut self, length: u64) -> Result<(), ChainError> {
        self.consume(length, |_, _| {})
    }

    /// Reads exactly `bytes.len()` bytes and moves past them.
    ///
    /// # Errors
    /// Fewer bytes are in view, or some are not guest memory.
    pub fn read(&mut self, bytes: &mut [u8]) -> Result<(), ChainError> {
        self.consume(bytes.len() as u64, |offset, memory| {
            if let Some(part) = bytes.get_mut(offset..) {
                memory.copy_to(part);
            }
        })
    }

    /// Writes all of `bytes` and moves past them.
    ///
    /// # Errors
    /// Fewer bytes are in view, or some are not guest memory.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ChainError> {
        self.consume(bytes.len() as u64, |offset, memory| {
            if let Some(part) = bytes.get(offset..) {
                memory.copy_from(part);
            }
        })
    }

    /// Splits off the last `length` bytes for [`Segments::write_tail`].
    ///
    /// # Errors
    /// Fewer bytes are in view.
    pub fn split_tail(&mut self, length: u64) -> Result<(), ChainError> {
        self.need(length)?;
        let mut left = length;
        while left > 0 {
            let Some(last) = self.end.checked_sub(1) else {
                break;
            };
            let Some(segment) = self.list.get_mut(last) else {
                break;
            };
            let size = segment.len() as u64;
            if size <= left {
                left -= size;
                self.end = last;
            } else {
                let (kept, aside) = segment.split((size - left) as usize);
                *segment = kept;
                self.list.insert(self.end, aside);
                left = 0;
            }
        }
        self.length -= length;
        Ok(())
    }

    /// Writes `bytes` to the start of the tail that was split off. Each call starts there again.
    ///
    /// # Errors
    /// Fewer bytes were split off, or some are not guest memory.
    pub fn write_tail(&mut self, bytes: &[u8]) -> Result<(), ChainError> {
        write_to(self.list.get(self.end..).unwrap_or_default(), bytes)
    }

    /// Splits off the next `length` bytes for [`Segments::write_head`]. They replace an earlier head.
    ///
    /// # Errors
    /// Fewer bytes are in view.
    pub fn split_head(&mut self, length: u64) -> Result<(), ChainError> {
        self.need(length)?;
        if self.cut > 0
            && let Some(&segment) = self.list.get(self.start)
        {
            // The part that was consumed becomes a segment of its own.
            self.replace_first(segment.with_front(self.cut).split(self.cut));
            self.cut = 0;
        }
        let start = self.start;
        let mut left = length;
        while left > 0 {
            let Some(&segment) = self.list.get(self.start) else {
                break;
            };
            let size = segment.len() as u64;
            if size <= left {
                left -= size;
                self.start += 1;
            } else {
                self.replace_first(segment.split(left as usize));
                left = 0;
            }
        }
        self.head = start..self.start;
        self.length -= length;
        Ok(())
    }

    /// Replaces the first segment in view by two, of which only the second one is in view.
    fn replace_first(&mut self, (front, rest): (Segment, Segment)) {
        if let Some(segment) = self.list.get_mut(self.start) {
            *segment = front;
            self.start += 1;
            self.end += 1;
            self.list.insert(self.start, rest);
        }
    }

    /// Writes `bytes` to the start of the head that was split off. Each call starts there again.
    ///
    /// # Errors
    /// As [`Segments::write_tail`].
    pub fn write_head(&mut self, bytes: &[u8]) -> Result<(), ChainError> {
        let head = self.list.get(self.head.clone());
        write_to(head.unwrap_or_default(), bytes)
    }

    /// Brings all bytes into view again: those that were consumed, and those that were split off.
    pub fn rewind(&mut self) {
        if let Some(segment) = self.list.get_mut(self.start)
            && self.cut > 0
        {
            *segment = segment.with_front(self.cut);
        }
        (self.start, self.cut, self.end) = (0, 0, self.list.len());
        self.head = 0..0;
        self.length = self.list.iter().map(|segment| segment.len() as u64).sum();
    }

    /// Returns all guest memory, be it consumed, in view or split off: for each piece, its address in this process and its length.
    pub fn pieces(&self) -> impl Iterator<Item = (usize, usize)> {
        self.list.iter().enumerate().filter_map(|(index, segment)| {
            let cut = if index == self.start { self.cut } else { 0 };
            let whole = segment.with_front(cut).0;
            (!segment.is_hole()).then_some((whole.iov_base.addr(), whole.iov_len))
        })
    }

    /// Returns the bytes in view as iovecs for vectored I/O. They stay valid while the chain lives and its segments do not change.
    ///
    /// # Errors
    /// A part of this half of the chain is not guest memory.
    #[inline]
    pub fn iovecs(&self) -> Result<&[libc::iovec], ChainError> {
        if self.holes {
            return Err(ChainError::NotMemory);
        }
        let segments = self.list.get(self.start..self.end).unwrap_or_default();
        // SAFETY: `Segment` is a transparent wrapper of `iovec`.
        Ok(unsafe { &*(ptr::from_ref(segments) as *const [libc::iovec]) })
    }

    /// Writes at most `most` bytes in view to `file` by one `writev(2)`, and moves past those that were written.
    ///
    /// # Errors
    /// That of the system call, or `InvalidInput` if some bytes are not guest memory.
    pub fn write_to(&mut self, file: BorrowedFd<'_>, most: u64) -> io::Result<usize> {
        self.transfer(most, |iovecs, count| {
            // SAFETY: the iovecs are mapped guest memory, which the chain keeps mapped.
            unsafe { libc::writev(file.as_raw_fd(), iovecs, count) }
        })
    }

    /// Reads at most `most` bytes from `file` into the bytes in view by one `readv(2)`, and moves past those that were read.
    ///
    /// # Errors
    /// As [`Segments::write_to`].
    pub fn read_from(&mut self, file: BorrowedFd<'_>, most: u64) -> io::Result<usize> {
        self.transfer(most, |iovecs, count| {
            // SAFETY: as above.
            unsafe { libc::readv(file.as_raw_fd(), iovecs, count) }
        })
    }

    /// Passes the first bytes in view, at most `most`, to a system call, and moves past as many as it returns.
    fn transfer(
        &mut self,
        most: u64,
        call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
    ) -> io::Result<usize> {
        // With many empty segments at the front, the call would move nothing, as at the end of a file.
        while self.start < self.end
            && let Some(segment) = self.list.get(self.start)
            && segment.len() == 0
        {
            self.start += 1;
        }
        let iovecs = self.iovecs().map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut part = [MaybeUninit::<libc::iovec>::uninit(); PARTS];
        let (pointer, count) = if most >= self.length {
            let count = iovecs.len().min(libc::UIO_MAXIOV as usize);
            (iovecs.as_ptr(), count)
        } else {
            let mut left = most;
            let mut count = 0;
            for (place, iovec) in part.iter_mut().zip(iovecs) {
                let length = left.min(iovec.iov_len as u64);
                if length == 0 && iovec.iov_len > 0 {
                    break;
                }
                place.write(libc::iovec {
                    iov_len: length as usize,
                    ..*iovec
                });
                left -= length;
                count += 1;
            }
            (part.as_ptr().cast(), count)
        };
        let moved = repeat(|| call(pointer, count as libc::c_int))?;
        // No more than was asked for, so this cannot fail.
        let _ = self.skip(moved as u64);
        Ok(moved)
    }
}

/// The bytes in view of several halves of chains, for one `readv(2)`.
pub(crate) struct Parts<'a> {
    iovecs: [MaybeUninit<libc::iovec>; MANY],
    count: usize,
    /// Bytes that can still be added.
    left: u64,
    segments: PhantomData<&'a Segments>,
}

impl<'a> Parts<'a> {
    /// Takes at most `most` bytes.
    pub fn new(most: u64) -> Self {
        Self {
            iovecs: [MaybeUninit::uninit(); MANY],
            count: 0,
            left: most,
            segments: PhantomData,
        }
    }

    /// Adds the bytes in view, or those of them for which there is room.
    ///
    /// # Errors
    /// Some are not guest memory.
    pub fn add(&mut self, segments: &'a Segments) -> Result<(), ChainError> {
        for iovec in segments.iovecs()? {
            let length = self.left.min(iovec.iov_len as u64);
            let Some(place) = self.iovecs.get_mut(self.count).filter(|_| length > 0) else {
                continue;
            };
            place.write(libc::iovec {
                iov_len: length as usize,
                ..*iovec
            });
            self.count += 1;
            self.left -= length;
        }
        Ok(())
    }

    /// Reads from `file`. Returns the number of bytes.
    ///
    /// # Errors
    /// That of the system call.
    pub fn read(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = self.iovecs.as_ptr().cast();
        // SAFETY: the first `count` iovecs are written. They are mapped guest memory, which the borrowed segments keep mapped.
        repeat(|| unsafe { libc::readv(file.as_raw_fd(), iovecs, self.count as libc::c_int) })
    }
}

/// Makes a system call that returns a number of bytes, again if a signal interrupts it.
fn repeat(call: impl Fn() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Writes `bytes` to the start of `segments`.
fn write_to(segments: &[Segment], bytes: &[u8]) -> Result<(), ChainError> {
    let mut rest = bytes;
    for segment in segments {
        if rest.is_empty() {
            break;
        }
        volatile(segment)?.copy_from(rest);
        rest = rest.get(segment.len()..).unwrap_or_default();
    }
    if rest.is_empty() {
        return Ok(());
    }
    Err(ChainError::TooShort {
        have: (bytes.len() - rest.len()) as u64,
        need: bytes.len() as u64,
    })
}

/// Returns the memory of a segment, while the segment is borrowed.
fn volatile(segment: &Segment) -> Result<VolatileSlice<'_>, ChainError> {
    if segment.is_hole() {
        return Err(ChainError::NotMemory);
    }
    // SAFETY: the segment was created from a volatile slice of memory, which its chain keeps mapped.
    Ok(unsafe { VolatileSlice::new(segment.0.iov_base.cast(), segment.len()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever was consumed, split off, or is left.
    #[test]
    fn pieces_are_all_that_was_pushed() {
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..500 {
            let mut memory = vec![0; 4096];
            let start = memory.as_ptr().addr();
            let mut segments = Segments::default();
            let mut pushed = Vec::new();
            let mut rest = memory.as_mut_slice();
            for _ in 0..random.usize(1..6) {
                let (piece, left) = rest.split_at_mut(random.usize(1..300));
                pushed.extend(piece.as_ptr().addr()..piece.as_ptr().addr() + piece.len());
                segments.push(&VolatileSlice::from(piece));
                // Between the pieces there is something else.
                rest = &mut left[random.usize(0..2)..];
                if random.u8(..) < 20 {
                    segments.push_hole(10);
                }
            }
            for _ in 0..random.usize(0..8) {
                let length = random.u64(0..=segments.len());
                // Holes cannot be written to.
                let _ = match random.u8(0..5) {
                    0 => segments.split_tail(length),
                    1 => segments.split_head(length),
                    2 => segments.skip(length),
                    _ => segments.write(&vec![1; length.min(40) as usize]),
                };
            }
            let covered: Vec<usize> = segments
                .pieces()
                .flat_map(|(pointer, length)| pointer..pointer + length)
                .collect();
            assert_eq!(covered, pushed, "from {start:#x}");
        }
    }
    /// Pushes all of `memory` in segments of these lengths.
    fn segments(memory: &mut [u8], lengths: &[usize]) -> Segments {
        let mut segments = Segments::default();
        let mut rest = memory;
        for length in lengths {
            let (piece, left) = rest.split_at_mut(*length);
            segments.push(&VolatileSlice::from(piece));
            rest = left;
        }
        segments
    }

    #[test]
    fn a_head_is_written_after_the_bytes_behind_it() {
        for lengths in [&[10][..], &[4, 6], &[3, 7], &[1; 10], &[4, 4, 2]] {
            let mut memory = *b"..........";
            let mut segments = segments(&mut memory, lengths);
            segments.split_head(4).unwrap();
            segments.split_tail(2).unwrap();
            assert_eq!(segments.len(), 4);
            segments.write(b"data").unwrap();
            let no_room = ChainError::TooShort { have: 4, need: 5 };
            assert_eq!(segments.write_head(b"wrong"), Err(no_room));
            segments.write_head(b"head").unwrap();
            segments.write_head(b"HE").unwrap();
            segments.write_tail(b"ta").unwrap();
            assert_eq!(&memory, b"HEaddatata", "{lengths:?}");
        }
    }

    #[test]
    fn a_head_begins_where_the_bytes_that_were_consumed_end() {
        for lengths in [&[10][..], &[4, 6], &[2, 3, 5], &[1; 10]] {
            let mut memory = *b"..........";
            let mut segments = segments(&mut memory, lengths);
            segments.write(b"ab").unwrap();
            segments.split_head(3).unwrap();
            segments.write(b"fgh").unwrap();
            segments.write_head(b"cde").unwrap();
            assert_eq!(segments.len(), 2);
            // A second head replaces the first one.
            segments.split_head(1).unwrap();
            segments.write_head(b"i").unwrap();
            let too_many = segments.split_head(2);
            assert_eq!(too_many, Err(ChainError::TooShort { have: 1, need: 2 }));
            segments.rewind();
            assert_eq!(segments.len(), 10);
            let no_head = ChainError::TooShort { have: 0, need: 1 };
            assert_eq!(segments.write_head(b"x"), Err(no_head));
            segments.write(b"A").unwrap();
            assert_eq!(&memory, b"Abcdefghi.", "{lengths:?}");
        }
    }

    #[test]
    fn a_head_outside_guest_memory_is_not_written() {
        let mut memory = *b"....";
        let mut segments = Segments::default();
        segments.push_hole(2);
        segments.push(&VolatileSlice::from(&mut memory[..]));
        segments.split_head(3).unwrap();
        assert_eq!(segments.write_head(b"abc"), Err(ChainError::NotMemory));
        segments.write(b"def").unwrap();
        assert_eq!(&memory, b".def");
    }

    #[test]
    fn a_vectored_call_moves_past_what_it_moved() {
        use std::os::fd::AsFd;
        let lengths = [1, 0, 3, 4, 2];
        for most in 0..=12 {
            let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
            writer.set_nonblocking(true).unwrap();
            let mut from = *b"0123456789";
            let mut source = segments(&mut from, &lengths);
            let written = source.write_to(writer.as_fd(), most).unwrap();
            assert_eq!(written as u64, most.min(10));
            assert_eq!(source.len(), 10 - written as u64);
            let mut to = [b'.'; 10];
            let mut target = segments(&mut to, &lengths);
            target.split_head(2).unwrap();
            if written > 0 {
                let read = target.read_from(reader.as_fd(), most).unwrap();
                assert_eq!(read, written.min(8));
                assert_eq!(target.len(), 8 - read as u64);
                assert_eq!(to[2..2 + read], b"0123456789"[..read], "{most}");
                assert_eq!(to[2 + read..], [b'.'; 8][read..], "{most}");
            }
            assert_eq!(to[..2], *b"..");
        }
    }

    #[test]
    fn a_vectored_call_moves_bytes_behind_any_number_of_empty_segments() {
        use std::os::fd::AsFd;
        let lengths = [vec![0; 2000], vec![2], vec![0; 2000], vec![2]].concat();
        for most in [3, 4] {
            let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
            let mut from = *b"0123";
            let mut source = segments(&mut from, &lengths);
            assert_eq!(source.write_to(writer.as_fd(), most).unwrap(), 2);
            assert_eq!(source.write_to(writer.as_fd(), most).unwrap(), 2);
            let mut to = [0; 4];
            let mut target = segments(&mut to, &lengths);
            assert_eq!(target.read_from(reader.as_fd(), most).unwrap(), 2);
            assert_eq!(target.read_from(reader.as_fd(), most).unwrap(), 2);
            target.rewind();
            assert_eq!(target.len(), 4);
            assert_eq!(&to, b"0123");
        }
    }

    #[test]
    fn one_call_reads_into_several_chains() {
        use std::io::Write;
        use std::os::fd::AsFd;
        let (reader, mut writer) = std::os::unix::net::UnixStream::pair().unwrap();
        writer.write_all(b"0123456789").unwrap();
        let mut memory = [[b'.'; 4]; 3];
        let [a, b, c] = &mut memory;
        let mut chains = [
            segments(a, &[1, 3]),
            segments(b, &[0, 4]),
            segments(c, &[4]),
        ]
        .map(|writable| {
            let mut halves = Box::<Halves>::default();
            halves.writable = writable;
            crate::chain::Chain::new(Default::default(), Default::default(), halves)
        });
        for chain in &mut chains {
            chain.split_head(1).unwrap();
        }
        let read = crate::chain::Chain::read_many(&mut chains, reader.as_fd(), 7);
        assert_eq!(read.unwrap(), 7);
        let left = chains.each_ref().map(crate::chain::Chain::writable_len);
        assert_eq!(left, [0, 0, 2]);
        assert_eq!(memory, [*b".012", *b".345", *b".6.."]);
    }

    #[test]
    fn a_vectored_call_fails_as_the_kernel_says_and_moves_nothing() {
        use std::os::fd::AsFd;
        let (reader, _writer) = std::os::unix::net::UnixStream::pair().unwrap();
        reader.set_nonblocking(true).unwrap();
        let mut memory = [0; 8];
        let mut target = segments(&mut memory, &[8]);
        let error = target.read_from(reader.as_fd(), 8).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(target.len(), 8);
        target.push_hole(1);
        let error = target.write_to(reader.as_fd(), 8).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
