//! A command's output as the bytes that go to the client: UTF-8 decoded across reads, escaped for JSON, framed as Server-Sent Events
//! (WHATWG HTML section 9.2) and as chunks (RFC 9112 section 7.1). Bytes in, bytes out; no I/O.
//!
//! All is appended to one batch, which the caller sends in one write as one chunk; each byte of output is copied once. Text
//! is validated a vector at a time; the search for what JSON must escape looks at eight bytes at a time, since most output has something
//! to escape only at line ends. What is not UTF-8 is taken apart by std, and escaped byte by byte.

use crate::clock::unix_millis;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::{borrow::Cow, fmt::Display, mem::take, process::ExitStatus};

/// What is sent of one command, from the response's head to the last chunk.
#[derive(Default)]
pub struct Stream {
    /// Events, or plain text.
    pub events: bool,
    /// In chunks, or up to the end of the connection.
    chunked: bool,
    /// Bytes of output, from stdout and from stderr.
    pub bytes: [u64; 2],
    pub batch: Vec<u8>,
    /// How much of it has been sent.
    sent: usize,
    /// Where the content of the open chunk begins in the batch.
    chunk: Option<usize>,
    /// The number of the last event.
    last: u64,
    /// Of each source, the beginning of a character whose end is still to come: three bytes at most.
    carried: [Vec<u8>; 2],
}

/// Where output comes from, in events and as the places of arrays.
pub const SOURCES: [&str; 2] = ["stdout", "stderr"];
/// Room for a chunk's size, which is known when the chunk is closed. Leading zeros are allowed.
const CHUNK_SIZE: &[u8] = b"000000\r\n";

impl Stream {
    /// `head` goes out with the first batch.
    pub fn new(events: bool, chunked: bool, head: Vec<u8>) -> Stream {
        let mut stream = Stream::default();
        (stream.events, stream.chunked, stream.batch) = (events, chunked, head);
        stream
    }

    /// The `start` event.
    pub fn start(&mut self, pid: u32) {
        self.event("start", "start", format_args!("\"pid\":{pid}}}\n\n"));
    }

    /// The `err` event, which says in words what went wrong.
    pub fn error(&mut self, why: &str) {
        self.text("err", "error", why.as_bytes());
    }

    /// The line of silence: a comment. No empty line follows, which some clients take for an event.
    pub fn comment(&mut self) {
        if self.events {
            self.open_chunk();
            self.batch.extend_from_slice(b":\n");
        }
    }

    /// A piece of output from one of [`SOURCES`]: an event, or none where the piece only begins a character.
    pub fn piece(&mut self, source: usize, bytes: &[u8]) {
        self.bytes[source] += bytes.len() as u64;
        if !self.events {
            self.open_chunk();
            return self.batch.extend_from_slice(bytes);
        }
        let carried = take(&mut self.carried[source]);
        let bytes = match carried.is_empty() {
            true => Cow::from(bytes),
            false => Cow::from([&carried, bytes].concat()),
        };
        let (whole, begun) = bytes.split_at(bytes.len() - unfinished(&bytes));
        self.carried[source] = begun.to_vec();
        self.text(SOURCES[source], SOURCES[source], whole);
    }

    /// The end: characters that were never completed; the `exit` event, or the trailer field; the last chunk. `how` is the word of
    /// the event's `out`.
    pub fn exit(&mut self, how: &str, status: ExitStatus, ms: u128) {
        for (name, begun) in SOURCES.into_iter().zip(take(&mut self.carried)) {
            self.text(name, name, &begun);
        }
        let number = |it: Option<i32>| it.map_or("null".to_string(), |it| it.to_string());
        let (code, signal, [stdout, stderr]) =
            (number(status.code()), number(status.signal()), self.bytes);
        let outcome = format!(r#""out":"{how}","code":{code},"signal":{signal},"ms":{ms}"#);
        let bytes = format!(r#""stdout_bytes":{stdout},"stderr_bytes":{stderr}"#);
        self.event("exit", "exit", format_args!("{outcome},{bytes}}}\n\n"));
        self.ready();
        let end = match status.code() {
            _ if !self.chunked => String::new(),
            _ if self.events => "0\r\n\r\n".to_string(),
            Some(code) => format!("0\r\nExit-Code: {code}\r\n\r\n"),
            None => format!("0\r\nExit-Signal: {signal}\r\n\r\n"),
        };
        self.batch.extend_from_slice(end.as_bytes());
    }

    /// All that is to be sent next.
    pub fn ready(&mut self) -> &[u8] {
        if let Some(content) = self.chunk.take() {
            let size = format!("{:06x}\r\n", self.batch.len() - content);
            self.batch[content - CHUNK_SIZE.len()..content].copy_from_slice(size.as_bytes());
            self.batch.extend_from_slice(b"\r\n");
        }
        &self.batch[self.sent..]
    }

    /// Forgets what was sent of what was ready. The batch is empty, and keeps its room, when all was.
    pub fn sent(&mut self, length: usize) {
        self.sent += length;
        if self.sent == self.batch.len() {
            self.batch.clear();
            self.sent = 0;
        }
    }

    /// An event whose `out` is `bytes`, if there are any.
    fn text(&mut self, event: &str, kind: &str, bytes: &[u8]) {
        if self.events && !bytes.is_empty() {
            self.event(event, kind, "\"out\":\"");
            decode(bytes, &mut self.batch);
            self.batch.extend_from_slice(b"\"}\n\n");
        }
    }

    /// An event, or its beginning: what `data` does not close goes on.
    fn event(&mut self, event: &str, kind: &str, data: impl Display) {
        if self.events {
            self.open_chunk();
            self.last += 1;
            let id = format_args!("{}-{}", unix_millis(), self.last);
            let fields = format_args!("id: {id}\nevent: {event}\ndata: ");
            // Writing to a Vec does not fail.
            let _ = write!(self.batch, "{fields}{{\"type\":\"{kind}\",{data}");
        }
    }

    fn open_chunk(&mut self) {
        if self.chunked && self.chunk.is_none() {
            self.batch.extend_from_slice(CHUNK_SIZE);
            self.chunk = Some(self.batch.len());
        }
    }
}

/// How many bytes at the end are the beginning of a character.
fn unfinished(bytes: &[u8]) -> usize {
    let end = &bytes[bytes.len().saturating_sub(3)..];
    let begins = |start: &usize| {
        let error = std::str::from_utf8(&end[*start..]).err();
        error.is_some_and(|it| it.valid_up_to() == 0 && it.error_len().is_none())
    };
    end.len() - (0..end.len()).find(begins).unwrap_or(end.len())
}

/// Appends `bytes`, decoded (WHATWG Encoding section 8.1.1: one U+FFFD for each maximal part of a character that breaks off, which is
/// how std counts too) and escaped.
fn decode(bytes: &[u8], out: &mut Vec<u8>) {
    if bytes.is_ascii() || is_utf8(bytes) {
        return escape(bytes, out);
    }
    for chunk in bytes.utf8_chunks() {
        // Mostly a few bytes: too short to search.
        for byte in chunk.valid().bytes() {
            escape_byte(byte, out);
        }
        if !chunk.invalid().is_empty() {
            out.extend_from_slice("\u{fffd}".as_bytes());
        }
    }
}

/// Whether all is UTF-8 (Unicode table 3-7). Each byte is looked at beside the three before it and nothing depends on what was found so
/// far, so that the compiler makes vectors of it: 1.5 times the throughput of streams in languages beyond ASCII, where std's
/// validation, character by character, takes 40 % of all time.
fn is_utf8(bytes: &[u8]) -> bool {
    let is_bad = |a: u8, b: u8, c: u8, d: u8| {
        let is_due = (a >= 0xf0) | (b >= 0xe0) | (c >= 0xc0);
        let is_continuation = d & 0xc0 == 0x80;
        let is_low = (c == 0xe0) & (d < 0xa0) | (c == 0xf0) & (d < 0x90);
        let is_high = (c == 0xed) & (d > 0x9f) | (c == 0xf4) & (d > 0x8f);
        let is_never = (d == 0xc0) | (d == 0xc1) | (d > 0xf4);
        (is_due != is_continuation) | is_low | is_high | is_never
    };
    let [a, b, c, ..] = *bytes else {
        return std::str::from_utf8(bytes).is_ok();
    };
    let mut is_any_bad = is_bad(0, 0, 0, a) | is_bad(0, 0, a, b) | is_bad(0, a, b, c);
    let nexts = bytes[2..].iter().zip(&bytes[3..]);
    for ((&a, &b), (&c, &d)) in bytes.iter().zip(&bytes[1..]).zip(nexts) {
        is_any_bad |= is_bad(a, b, c, d);
    }
    !is_any_bad && unfinished(bytes) == 0
}

/// Appends UTF-8 as the inside of a JSON string (RFC 8259 section 7): `"`, `\` and all below U+0020 escaped, nothing else.
fn escape(mut text: &[u8], out: &mut Vec<u8>) {
    loop {
        let (clean, rest) = text.split_at(clean_prefix(text));
        out.extend_from_slice(clean);
        let Some((&byte, rest)) = rest.split_first() else {
            return;
        };
        escape_byte(byte, out);
        text = rest;
    }
}

/// Each byte as it stands in a JSON string, filled up to seven bytes, and how many of the eight do not belong to it.
static ESCAPED: [[u8; 8]; 256] = {
    let (mut table, mut byte) = ([[0; 8]; 256], 0);
    while byte < table.len() {
        let (high, low) = (b'0' + (byte >> 4) as u8, b"0123456789abcdef"[byte & 15]);
        table[byte] = match byte {
            0x08..=0x0a | 0x0c | 0x0d => [b'\\', b"btn fr"[byte - 8], 0, 0, 0, 0, 0, 6],
            0x00..=0x1f => [b'\\', b'u', b'0', b'0', high, low, 0, 2],
            0x22 | 0x5c => [b'\\', byte as u8, 0, 0, 0, 0, 0, 6],
            _ => [byte as u8, 0, 0, 0, 0, 0, 0, 7],
        };
        byte += 1;
    }
    table
};

/// Without a branch, since nobody foresees the next byte of what is not text: 2.1 times the throughput of branches there.
fn escape_byte(byte: u8, out: &mut Vec<u8>) {
    let escaped = ESCAPED[usize::from(byte)];
    out.extend_from_slice(&escaped);
    out.truncate(out.len() - usize::from(escaped[7]));
}

/// How many bytes stand before the first that JSON must escape, eight at a time: 2.5 times the throughput of blocks that the compiler
/// makes vectors of, on lines of text, and the same at every optimisation level.
fn clean_prefix(text: &[u8]) -> usize {
    const ONES: u64 = u64::MAX / 255;
    // A subtraction borrows into a byte's top bit where the byte is below what is taken from it. It may mark bytes after the first such
    // one too, never before it; the first is the lowest.
    let below = |word: u64, limit: u64| word.wrapping_sub(ONES * limit) & !word & (ONES << 7);
    let mut place = 0;
    while let Some(&word) = text[place..].first_chunk() {
        let word = u64::from_le_bytes(word);
        let (quote, backslash) = (word ^ (ONES * 0x22), word ^ (ONES * 0x5c));
        let marks = below(word, 0x20) | below(quote, 1) | below(backslash, 1);
        if marks != 0 {
            return place + marks.trailing_zeros() as usize / 8;
        }
        place += 8;
    }
    let must_escape = |&byte: &u8| byte < 0x20 || byte == b'"' || byte == b'\\';
    let rest = text[place..].iter().position(must_escape);
    rest.map_or(text.len(), |rest| place + rest)
}

#[cfg(test)]
mod tests;
