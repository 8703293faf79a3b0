//! A command's output as the bytes that go to the client: UTF-8 decoded across reads, escaped for JSON, framed as Server-Sent Events
//! (WHATWG HTML section 9.2) and as chunks (RFC 9112 section 7.1). Bytes in, bytes out; no I/O.
//!
//! All is appended to one batch, which the caller sends in one write as one chunk; each byte of output is copied once. Validation is
//! std's; the search for what JSON must escape looks at eight bytes at a time, since most output has something to escape only at
//! line ends.

use crate::clock;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Where a piece of output came from. The value is an index.
#[derive(Clone, Copy)]
pub enum Source {
    Stdout,
    Stderr,
}

/// Events or plain text, in chunks or up to the end of the connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Format {
    pub events: bool,
    pub chunked: bool,
}

/// What is sent of one command, from the response's head to the last chunk.
pub struct Stream {
    pub format: Format,
    pub batch: Vec<u8>,
    /// Where the open chunk begins in the batch.
    chunk: Option<usize>,
    /// The number of the last event.
    events: u64,
    /// A character cut in two, of each source.
    carried: [Carry; 2],
}

/// A chunk's size is written last, into a place that is kept for it. Leading zeros are allowed.
const SIZE_PLACE: &[u8] = b"00000\r\n";
/// The end of a string, of its object and of the event.
const TEXT_END: &[u8] = b"\"}\n\n";

impl Source {
    pub fn name(self) -> &'static str {
        ["stdout", "stderr"][self as usize]
    }
}

impl Stream {
    /// `head` goes out with the first batch.
    pub fn new(format: Format, head: Vec<u8>) -> Stream {
        Stream {
            format,
            batch: head,
            chunk: None,
            events: 0,
            carried: Default::default(),
        }
    }

    /// The `start` event.
    pub fn start(&mut self, pid: u32) {
        if self.format.events {
            self.open("start", "start");
            let _ = write!(self.batch, "\"pid\":{pid}}}\n\n");
        }
    }

    /// A piece of output: an event, or none where the piece only begins a character.
    pub fn piece(&mut self, source: Source, bytes: &[u8]) {
        if self.format.events {
            let write =
                |carried: &mut [Carry; 2], out: &mut _| carried[source as usize].decode(bytes, out);
            self.text(source.name(), source.name(), write);
        } else {
            self.content().extend_from_slice(bytes);
        }
    }

    /// The `err` event, which says in words what went wrong.
    pub fn error(&mut self, why: &str) {
        self.text("err", "error", |_, out| escape(why.as_bytes(), out));
    }

    /// The line of silence: a comment. No empty line follows, which some clients take for an event.
    pub fn comment(&mut self) {
        if self.format.events {
            self.content().extend_from_slice(b":\n");
        }
    }

    /// The end: characters that were never completed; the `exit` event, or the trailer field; the last chunk. `how` is the word of
    /// the event's `out`; `bytes` were read from stdout and stderr.
    pub fn exit(&mut self, how: &str, status: ExitStatus, ms: u128, bytes: [u64; 2]) {
        for source in [Source::Stdout, Source::Stderr] {
            let write =
                |carried: &mut [Carry; 2], out: &mut _| carried[source as usize].finish(out);
            self.text(source.name(), source.name(), write);
        }
        let number = |it: Option<i32>| it.map_or("null".to_string(), |it| it.to_string());
        let (code, signal, [stdout, stderr]) =
            (number(status.code()), number(status.signal()), bytes);
        if self.format.events {
            self.open("exit", "exit");
            let _ = write!(
                self.batch,
                r#""out":"{how}","code":{code},"signal":{signal},"ms":{ms},"#
            );
            let _ = write!(
                self.batch,
                "\"stdout_bytes\":{stdout},\"stderr_bytes\":{stderr}}}\n\n"
            );
        }
        self.close_chunk();
        if self.format.chunked {
            let trailer = match status.code() {
                _ if self.format.events => String::new(),
                Some(code) => format!("Exit-Code: {code}\r\n"),
                None => format!("Exit-Signal: {signal}\r\n"),
            };
            self.batch
                .extend_from_slice(format!("0\r\n{trailer}\r\n").as_bytes());
        }
    }

    /// What is to be sent. It is given back, so that its room is used again.
    pub fn take(&mut self) -> Vec<u8> {
        self.close_chunk();
        std::mem::take(&mut self.batch)
    }

    pub fn give_back(&mut self, mut sent: Vec<u8>) {
        if self.batch.is_empty() {
            sent.clear();
            self.batch = sent;
        }
    }

    /// Begins an event: all that stands before its data's first value.
    fn open(&mut self, event: &str, kind: &str) {
        self.events += 1;
        let (id, millis) = (self.events, clock::unix_millis());
        let out = self.content();
        // Writing to a Vec does not fail.
        let _ = write!(
            out,
            "id: {millis}-{id}\nevent: {event}\ndata: {{\"type\":\"{kind}\","
        );
    }

    /// An event with a text, which `write` appends; none where that is empty.
    fn text(&mut self, event: &str, kind: &str, write: impl FnOnce(&mut [Carry; 2], &mut Vec<u8>)) {
        if !self.format.events {
            return;
        }
        self.content();
        let before = self.batch.len();
        self.open(event, kind);
        self.batch.extend_from_slice(b"\"out\":\"");
        let start = self.batch.len();
        write(&mut self.carried, &mut self.batch);
        if self.batch.len() > start {
            self.batch.extend_from_slice(TEXT_END);
        } else {
            self.events -= 1;
            self.batch.truncate(before);
        }
    }

    /// The batch, at a place where content may stand.
    fn content(&mut self) -> &mut Vec<u8> {
        if self.format.chunked && self.chunk.is_none() {
            self.chunk = Some(self.batch.len());
            self.batch.extend_from_slice(SIZE_PLACE);
        }
        &mut self.batch
    }

    fn close_chunk(&mut self) {
        let Some(start) = self.chunk.take() else {
            return;
        };
        let size = self.batch.len() - start - SIZE_PLACE.len();
        if size == 0 {
            // A chunk without content would be the last one.
            self.batch.truncate(start);
        } else {
            self.batch[start..start + 5].copy_from_slice(format!("{size:05x}").as_bytes());
            self.batch.extend_from_slice(b"\r\n");
        }
    }
}

/// The bytes of a character whose end is still to come: three at most, and always the beginning of a valid one.
#[derive(Default)]
struct Carry {
    bytes: [u8; 4],
    len: usize,
}

/// U+FFFD, which stands for bytes that are not UTF-8.
const REPLACEMENT: &[u8] = "\u{fffd}".as_bytes();

impl Carry {
    /// Appends `bytes`, decoded (WHATWG Encoding section 8.1.1: one U+FFFD for each maximal part of a character that breaks off, which
    /// is how std counts too) and escaped.
    fn decode(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while self.len > 0 {
            let Some((&next, rest)) = bytes.split_first() else {
                return;
            };
            self.bytes[self.len] = next;
            match std::str::from_utf8(&self.bytes[..=self.len]) {
                Ok(character) => out.extend_from_slice(character.as_bytes()),
                Err(error) if error.error_len().is_none() => {
                    self.len += 1;
                    bytes = rest;
                    continue;
                }
                // The character breaks off before `next`, which begins another.
                Err(_) => {
                    self.finish(out);
                    break;
                }
            }
            bytes = rest;
            self.len = 0;
        }
        while let Err(error) = std::str::from_utf8(bytes) {
            let (valid, rest) = bytes.split_at(error.valid_up_to());
            escape(valid, out);
            let Some(invalid) = error.error_len() else {
                self.bytes[..rest.len()].copy_from_slice(rest);
                self.len = rest.len();
                return;
            };
            out.extend_from_slice(REPLACEMENT);
            bytes = &rest[invalid..];
        }
        escape(bytes, out);
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        if self.len > 0 {
            out.extend_from_slice(REPLACEMENT);
            self.len = 0;
        }
    }
}

/// What has a short escape, by how often it occurs.
const SHORT: [(u8, u8); 7] = [
    (b'\n', b'n'),
    (b'"', b'"'),
    (b'\\', b'\\'),
    (b'\t', b't'),
    (b'\r', b'r'),
    (8, b'b'),
    (12, b'f'),
];

/// Appends UTF-8 as the inside of a JSON string (RFC 8259 section 7): `"`, `\` and all below U+0020 escaped, nothing else.
fn escape(text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    loop {
        let clean = clean_prefix(rest);
        out.extend_from_slice(&rest[..clean]);
        let Some(&byte) = rest.get(clean) else { return };
        rest = &rest[clean + 1..];
        match SHORT.iter().position(|short| short.0 == byte) {
            Some(place) => out.extend_from_slice(&[b'\\', SHORT[place].1]),
            None => {
                let hex = |digit: u8| b"0123456789abcdef"[usize::from(digit)];
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', hex(byte >> 4), hex(byte & 15)]);
            }
        }
    }
}

/// How many bytes stand before the first that JSON must escape.
fn clean_prefix(text: &[u8]) -> usize {
    const ONES: u64 = u64::MAX / 255;
    const TOPS: u64 = ONES << 7;
    let mut words = text.chunks_exact(8);
    let mut clean = 0;
    for word in &mut words {
        // A subtraction borrows into a byte's top bit where the byte is less than what is taken from it. A borrow may mark bytes after
        // the first such one too, never before it; in little-endian order the first is the lowest.
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        let below = |word: u64, limit: u64| word.wrapping_sub(ONES * limit) & !word;
        let quote = word ^ (ONES * u64::from(b'"'));
        let backslash = word ^ (ONES * u64::from(b'\\'));
        let marks = (below(word, 0x20) | below(quote, 1) | below(backslash, 1)) & TOPS;
        if marks != 0 {
            return clean + marks.trailing_zeros() as usize / 8;
        }
        clean += 8;
    }
    let must_escape = |byte: &u8| matches!(byte, 0..0x20 | b'"' | b'\\');
    clean
        + words
            .remainder()
            .iter()
            .position(must_escape)
            .unwrap_or(words.remainder().len())
}

#[cfg(test)]
mod tests;
