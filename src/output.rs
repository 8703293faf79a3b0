//! A command's output as an event stream: UTF-8 decoded across reads, escaped for JSON, framed as Server-Sent Events
//! (WHATWG HTML section 9.2). Bytes in, bytes out; no I/O.
//!
//! The encoder appends to a buffer that its caller sends in one write, and copies each byte of output once. Validation is std's;
//! the search for what JSON must escape looks at eight bytes at a time, since most output has something to escape only at line ends.

use crate::clock;
use std::io::Write as _;

/// Where a piece of output came from. The value is an index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Source {
    Stdout,
    Stderr,
}

/// How a command ended: one of the two numbers of the `exit` event.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Status {
    Code(i32),
    Signal(i32),
}

/// The state of one event stream: the number of its last event, and a character cut in two for each source.
#[derive(Default)]
pub struct Encoder {
    events: u64,
    carried: [Carry; 2],
}

/// The line of silence: a comment. No empty line follows, which some clients take for an event.
pub const COMMENT: &[u8] = b":\n";

impl Source {
    pub fn name(self) -> &'static str {
        ["stdout", "stderr"][self as usize]
    }
}

impl Encoder {
    /// The `start` event.
    pub fn start(&mut self, pid: u32, out: &mut Vec<u8>) {
        self.open("start", out);
        close(out, format_args!("{{\"type\":\"start\",\"pid\":{pid}}}"));
    }

    /// An event with a piece of output; none where the piece only begins a character.
    pub fn piece(&mut self, source: Source, bytes: &[u8], out: &mut Vec<u8>) {
        self.text(source, out, |carry, out| carry.decode(bytes, out));
    }

    /// What is left of a source at its end: a character that was never completed.
    pub fn end_of(&mut self, source: Source, out: &mut Vec<u8>) {
        self.text(source, out, |carry, out| carry.finish(out));
    }

    /// The `err` event, which says in words what went wrong.
    pub fn error(&mut self, why: &str, out: &mut Vec<u8>) {
        self.open("err", out);
        out.extend_from_slice(b"{\"type\":\"error\",\"out\":\"");
        escape(why.as_bytes(), out);
        close(out, format_args!("\"}}"));
    }

    /// The `exit` event, the last one. `how` is the word of its `out`; `bytes` were read from stdout and stderr.
    pub fn exit(
        &mut self,
        how: &str,
        status: Status,
        ms: u128,
        bytes: [u64; 2],
        out: &mut Vec<u8>,
    ) {
        let (code, signal) = match status {
            Status::Code(code) => (code.to_string(), "null".to_string()),
            Status::Signal(signal) => ("null".to_string(), signal.to_string()),
        };
        let [stdout, stderr] = bytes;
        self.open("exit", out);
        close(
            out,
            format_args!(
                "{{\"type\":\"exit\",\"out\":\"{how}\",\"code\":{code},\"signal\":{signal},\"ms\":{ms},\
                 \"stdout_bytes\":{stdout},\"stderr_bytes\":{stderr}}}"
            ),
        );
    }

    fn open(&mut self, event: &str, out: &mut Vec<u8>) {
        self.events += 1;
        // Writing to a Vec does not fail.
        let _ = write!(
            out,
            "id: {}-{}\nevent: {event}\ndata: ",
            clock::unix_millis(),
            self.events
        );
    }

    fn text(
        &mut self,
        source: Source,
        out: &mut Vec<u8>,
        decode: impl FnOnce(&mut Carry, &mut Vec<u8>),
    ) {
        let (before, name) = (out.len(), source.name());
        self.open(name, out);
        let _ = write!(out, "{{\"type\":\"{name}\",\"out\":\"");
        let body = out.len();
        decode(&mut self.carried[source as usize], out);
        if out.len() == body {
            self.events -= 1;
            out.truncate(before);
        } else {
            close(out, format_args!("\"}}"));
        }
    }
}

fn close(out: &mut Vec<u8>, end: std::fmt::Arguments) {
    let _ = write!(out, "{end}\n\n");
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

/// Appends UTF-8 as the inside of a JSON string (RFC 8259 section 7): `"`, `\` and all below U+0020 escaped, nothing else.
fn escape(text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    loop {
        let clean = clean_prefix(rest);
        out.extend_from_slice(&rest[..clean]);
        let Some(&byte) = rest.get(clean) else { return };
        rest = &rest[clean + 1..];
        match byte {
            b'\n' => out.extend_from_slice(b"\\n"),
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x0c => out.extend_from_slice(b"\\f"),
            control => {
                let hex = b"0123456789abcdef";
                let digits = [
                    hex[usize::from(control >> 4)],
                    hex[usize::from(control & 15)],
                ];
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&digits);
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
