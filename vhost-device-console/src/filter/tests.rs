// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What passes the filter, and what does not.

use super::*;

fn filtered(pieces: &[&[u8]]) -> Vec<u8> {
    let mut filter = Filter::default();
    let mut output = Vec::new();
    for piece in pieces {
        filter.apply(piece, &mut output);
    }
    output
}

/// Filters `input` in one piece, and in all pairs of pieces, and byte by byte.
#[track_caller]
fn check(input: &[u8], expected: &[u8]) {
    let shown = |bytes: &[u8]| bytes.escape_ascii().to_string();
    for at in 0..=input.len() {
        let (a, b) = input.split_at(at);
        assert_eq!(shown(&filtered(&[a, b])), shown(expected), "{at}");
    }
    let bytes: Vec<&[u8]> = input.chunks(1).collect();
    assert_eq!(shown(&filtered(&bytes)), shown(expected));
}

#[test]
fn what_a_screen_needs_passes_unchanged() {
    for sequence in [
        "plain text\r\n\ttab \u{8}\u{7}",
        "ümläute, 漢字, 🦀, combining e\u{301}",
        "\x1b[1;31mred\x1b[0m \x1b[38;5;200mx \x1b[38:2:1:2:3mx\x1b[m",
        "\x1b[H\x1b[2J\x1b[3J\x1b[10;20H\x1b[5A\x1b[K\x1b[?K\x1b[4L\x1b[3M\x1b[2P\x1b[2@\x1b[9X",
        "\x1b[1;24r\x1b[3S\x1b[3T\x1b[s\x1b[u\x1b[4h\x1b[4l\x1b[20h",
        "\x1b[?25l\x1b[?25h\x1b[?1049h\x1b[?1049l\x1b[?2004h\x1b[?1;7h",
        "\x1b7\x1b8\x1b=\x1b>\x1bD\x1bM\x1bE\x1bH\x1bc",
        "\x1b(0lqk\x1b(B\x1b)0\x0e\x0f\x1b#8",
        "\x1b[2 q",
    ] {
        check(sequence.as_bytes(), sequence.as_bytes());
    }
}

#[test]
fn what_makes_a_terminal_type_or_changes_it_is_taken_out() {
    for sequence in [
        // Reports: cursor, status, identity, size, title, mode, setting, version, answerback.
        "\x1b[6n",
        "\x1b[5n",
        "\x1b[?6n",
        "\x1b[c",
        "\x1b[0c",
        "\x1b[>c",
        "\x1b[=c",
        "\x1bZ",
        "\x1b[18t",
        "\x1b[21t",
        "\x1b[?25$p",
        "\x1bP$qm\x1b\\",
        "\x1b[>q",
        "\x1b[>0q",
        "\x1b[1x",
        "\x05",
        // Title, palette, clipboard, links, files, notifications.
        "\x1b]0;title\x07",
        "\x1b]2;title\x1b\\",
        "\x1b]52;c;cm0gLXJmIH4K\x07",
        "\x1b]4;1;?\x07",
        "\x1b]8;;https://example.org\x1b\\",
        "\x1b]1337;File=:AAAA\x07",
        "\x1b]9;text\x07",
        // Strings.
        "\x1bPq#0;2;0;0;0\x1b\\",
        "\x1b_Gf=24;AAAA\x1b\\",
        "\x1b^text\x1b\\",
        "\x1bXtext\x1b\\",
        // Mouse, focus, keyboard, width, window, printer, soft reset, memory lock.
        "\x1b[?1000h",
        "\x1b[?1006;1000h",
        "\x1b[?1004h",
        "\x1b[>4;2m",
        "\x1b[>1u",
        "\x1b[?u",
        "\x1b[?3h",
        "\x1b[8;1;1t",
        "\x1b[3;0;0t",
        "\x1b[5i",
        "\x1b[4i",
        "\x1b[!p",
        "\x1b[1;2;3;4;5T",
        "\x1bl",
        "\x1b%@",
        "\x1bn",
        // Numbers that keep a terminal busy.
        "\x1b[99999b",
        "\x1b[4294967295S",
        "\x1b[+1m",
        "\x1b[ 1m",
        // Control characters of one byte, in UTF-8.
        "\u{9b}",
        "\u{9d}",
        "\u{90}",
        "\x00\x01\x11\x13\x7f\x18\x1a",
    ] {
        let input = format!("a{sequence}b");
        check(input.as_bytes(), b"ab");
    }
}

#[test]
fn bytes_that_are_not_utf_8_become_question_marks() {
    check(b"a\x9b31mb", b"a?31mb");
    check(b"a\x9d0;t\x07b", b"a?0;t\x07b");
    check(b"\xff\xc0\xaf\xf8", b"????");
    check(b"\xe2\x82z", b"?z");
    check(b"\xed\xa0\x80z", b"?z");
    check(b"\xe2\x82\x1b[6nz", b"?z");
}

#[test]
fn a_sequence_that_does_not_end_hides_no_later_line() {
    check(b"\x1b]0;endless\nnext\n", b"\nnext\n");
    check(b"\x1bPendless\r\nnext", b"\r\nnext");
    check(b"\x1b[12\nnext", b"\nnext");
    check(b"\x1b]0;x\x18next", b"next");
    check(b"\x1b[1\x1b[31mred", b"\x1b[31mred");
    check(b"\x1b\x1b[31mred", b"\x1b[31mred");
    check(b"\x1b]0;\x1b[31mred", b"\x1b[31mred");
    check(b"\x1b(\nx", b"\nx");
}

#[test]
fn long_sequences_are_taken_out_and_not_kept() {
    let mut input = b"a\x1b[".to_vec();
    input.extend([b'1'; 1000]);
    input.extend(b"mb");
    assert_eq!(filtered(&[&input]), b"ab");
    let mut filter = Filter::default();
    let mut output = Vec::new();
    filter.apply(b"\x1b]", &mut output);
    for _ in 0..1000 {
        filter.apply(&[b'x'; 1000], &mut output);
    }
    assert_eq!(filter.mode, Mode::Ignored);
    assert_eq!(output, b"");
}

/// Whatever comes in, nothing comes out that the list does not have, and a second filter changes nothing.
#[test]
fn random_input_leaves_only_what_passes() {
    let mut state = 7u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as usize
    };
    let alphabet = b"\x1b\x1b\x1b[[]P?;0123456789hlmnctq$>A\x07\\\x9b\xc2\x9b\xe2\x82\xacx\n\x18";
    for _ in 0..2000 {
        let input: Vec<u8> = (0..random() % 60)
            .map(|_| alphabet[random() % alphabet.len()])
            .collect();
        let once = filtered(&[&input]);
        assert_eq!(filtered(&[&once]), once, "{}", input.escape_ascii());
        assert!(!once.contains(&0x9b) || str::from_utf8(&once).is_ok());
    }
}
