//! A command's output as the bytes that go to the client: UTF-8 decoded across reads, escaped for JSON, framed as Server-Sent Events
//! (WHATWG HTML section 9.2) and as chunks (RFC 9112 section 7.1). Bytes in, bytes out; no I/O.
//!
//! All is appended to one batch, which the caller sends in one write as one chunk; each byte of output is copied once. Validation is
//! std's; the search for what JSON must escape looks at eight bytes at a time, since most output has something to escape only at
//! line ends.

use crate::clock::unix_millis;
use std::io::Write as _;
use std::{borrow::Cow, mem::take, os::unix::prelude::*, process::ExitStatus};

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
    /// Where the content of the open chunk begins in the batch.
    chunk: Option<usize>,
    /// The number of the last event.
    events: u64,
    /// Of each source, the beginning of a character whose end is still to come: three bytes at most.
    carried: [Vec<u8>; 2],
}

/// Where output comes from, in events and as the places of arrays.
pub const SOURCES: [&str; 2] = ["stdout", "stderr"];
/// U+FFFD, which stands for bytes that are not UTF-8.
const REPLACEMENT: &[u8] = "\u{fffd}".as_bytes();

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
        self.event("start", "start", &format!("\"pid\":{pid}}}"));
    }

    /// The `err` event, which says in words what went wrong.
    pub fn error(&mut self, why: &str) {
        let mut text = b"\"out\":\"".to_vec();
        escape(why.as_bytes(), &mut text);
        self.event("err", "error", &(String::from_utf8_lossy(&text) + "\"}"));
    }

    /// The line of silence: a comment. No empty line follows, which some clients take for an event.
    pub fn comment(&mut self) {
        if self.format.events {
            self.open_chunk();
            self.batch.extend_from_slice(b":\n");
        }
    }

    /// A piece of output from one of [`SOURCES`]: an event, or none where the piece only begins a character.
    pub fn piece(&mut self, source: usize, bytes: &[u8]) {
        self.open_chunk();
        if !self.format.events {
            return self.batch.extend_from_slice(bytes);
        }
        let (before, carried) = (self.batch.len(), take(&mut self.carried[source]));
        let bytes = if carried.is_empty() {
            Cow::from(bytes)
        } else {
            [&carried, bytes].concat().into()
        };
        self.event(SOURCES[source], SOURCES[source], "\"out\":\"");
        let start = self.batch.len();
        self.carried[source] = decode(&bytes, &mut self.batch);
        if self.batch.len() > start {
            self.batch.extend_from_slice(b"\"}\n\n");
        } else {
            self.batch.truncate(before);
            self.events -= 1;
        }
    }

    /// The end: characters that were never completed; the `exit` event, or the trailer field; the last chunk. `how` is the word of
    /// the event's `out`; `bytes` were read from stdout and stderr.
    pub fn exit(&mut self, how: &str, status: ExitStatus, ms: u128, bytes: [u64; 2]) {
        for (name, carried) in SOURCES.into_iter().zip(take(&mut self.carried)) {
            if !carried.is_empty() {
                self.event(name, name, "\"out\":\"\u{fffd}\"}");
            }
        }
        let number = |it: Option<i32>| it.map_or("null".to_string(), |it| it.to_string());
        let (code, signal, [stdout, stderr]) =
            (number(status.code()), number(status.signal()), bytes);
        let outcome = format!(r#""out":"{how}","code":{code},"signal":{signal},"ms":{ms}"#);
        let bytes = format!(r#""stdout_bytes":{stdout},"stderr_bytes":{stderr}"#);
        self.event("exit", "exit", &format!("{outcome},{bytes}}}"));
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

    /// What is to be sent; to be given back, so that its room is used again.
    pub fn take(&mut self) -> Vec<u8> {
        self.close_chunk();
        take(&mut self.batch)
    }

    pub fn give_back(&mut self, mut sent: Vec<u8>) {
        if self.batch.is_empty() {
            sent.clear();
            self.batch = sent;
        }
    }

    /// An event of an event stream, or its beginning: data that is not closed by a `}` goes on.
    fn event(&mut self, event: &str, kind: &str, data: &str) {
        if self.format.events {
            self.open_chunk();
            self.events += 1;
            let (millis, id, end) = (
                unix_millis(),
                self.events,
                if data.ends_with('}') { "\n\n" } else { "" },
            );
            let data = format_args!("data: {{\"type\":\"{kind}\",{data}{end}");
            // Writing to a Vec does not fail.
            let _ = write!(self.batch, "id: {millis}-{id}\nevent: {event}\n{data}");
        }
    }

    /// A chunk's size is written last, into a place that is kept for it. Leading zeros are allowed.
    fn open_chunk(&mut self) {
        if self.format.chunked && self.chunk.is_none() {
            self.batch.extend_from_slice(b"00000\r\n");
            self.chunk = Some(self.batch.len());
        }
    }

    fn close_chunk(&mut self) {
        let Some(content) = self.chunk.take() else {
            return;
        };
        let size = format!("{:05x}\r\n", self.batch.len() - content);
        self.batch[content - size.len()..content].copy_from_slice(size.as_bytes());
        if self.batch.len() > content {
            self.batch.extend_from_slice(b"\r\n");
        } else {
            // A chunk without content would be the last one.
            self.batch.truncate(content - size.len());
        }
    }
}

/// Appends `bytes`, decoded (WHATWG Encoding section 8.1.1: one U+FFFD for each maximal part of a character that breaks off, which is
/// how std counts too) and escaped. Returns the beginning of a character at the end.
fn decode(mut bytes: &[u8], out: &mut Vec<u8>) -> Vec<u8> {
    while let Err(error) = std::str::from_utf8(bytes) {
        let (valid, rest) = bytes.split_at(error.valid_up_to());
        escape(valid, out);
        let Some(invalid) = error.error_len() else {
            return rest.to_vec();
        };
        out.extend_from_slice(REPLACEMENT);
        bytes = &rest[invalid..];
    }
    escape(bytes, out);
    Vec::new()
}

/// Appends UTF-8 as the inside of a JSON string (RFC 8259 section 7): `"`, `\` and all below U+0020 escaped, nothing else.
fn escape(mut text: &[u8], out: &mut Vec<u8>) {
    let hex = |digit: u8| b"0123456789abcdef"[usize::from(digit)];
    loop {
        let (clean, rest) = text.split_at(clean_prefix(text));
        out.extend_from_slice(clean);
        let Some((&byte, rest)) = rest.split_first() else {
            return;
        };
        text = rest;
        match b"\n\"\\\t\r\x08\x0c".iter().position(|&each| each == byte) {
            Some(place) => out.extend_from_slice(&[b'\\', b"n\"\\trbf"[place]]),
            None => {
                let (high, low) = (hex(byte >> 4), hex(byte & 15));
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
            }
        }
    }
}

/// How many bytes stand before the first that JSON must escape, eight at a time: 2.5 times the throughput of blocks that the compiler
/// makes vectors of, on lines of text, and the same at every optimisation level.
fn clean_prefix(text: &[u8]) -> usize {
    const ONES: u64 = u64::MAX / 255;
    const TOPS: u64 = ONES << 7;
    // A subtraction borrows into a byte's top bit where the byte is below what is taken from it. It may mark bytes after the first such
    // one too, never before it; the first is the lowest.
    let below = |word: u64, limit: u64| word.wrapping_sub(ONES * limit) & !word;
    let marks_of = |word: &[u8]| {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        let quote = word ^ (ONES * u64::from(b'"'));
        let backslash = word ^ (ONES * u64::from(b'\\'));
        (below(word, 0x20) | below(quote, 1) | below(backslash, 1)) & TOPS
    };
    let mut words = text.chunks_exact(8);
    for (number, marks) in words.by_ref().map(marks_of).enumerate() {
        if marks != 0 {
            return number * 8 + marks.trailing_zeros() as usize / 8;
        }
    }
    let rest = words.remainder();
    let must_escape = |&byte: &u8| byte < 0x20 || byte == b'"' || byte == b'\\';
    text.len() - rest.len() + rest.iter().position(must_escape).unwrap_or(rest.len())
}

#[cfg(test)]
mod tests;
