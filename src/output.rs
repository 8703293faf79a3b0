//! A command's output as the bytes that go to the client: UTF-8 decoded across reads, escaped for JSON, framed
//! as Server-Sent Events (WHATWG HTML section 9.2) and as chunks (RFC 9112 section 7.1). Bytes in, bytes out;
//! no I/O.

use crate::clock::unix_millis;
use std::{fmt::Display, io::Write, mem::take, time::Duration};

/// Where output comes from, by its event's name.
pub const SOURCES: [&str; 2] = ["stdout", "stderr"];
/// Clients take chunk sizes of 16 digits at most, of which a size needs some for itself.
const MOST_ZEROS: usize = 8;

/// What is sent of one command, from the response's head to the last chunk.
#[derive(Default)]
pub struct Stream {
    /// Events, or plain text.
    pub is_events: bool,
    /// In chunks, or up to the end of the connection.
    is_chunked: bool,
    /// Bytes of output, from each of [`SOURCES`].
    bytes: [u64; 2],
    /// The number of the last event.
    last_event: u64,
    /// Of each source the beginning of a character whose end is still to come, three bytes at most.
    unfinished: [Vec<u8>; 2],
    /// Encoded, and not yet made a chunk of.
    content: Vec<u8>,
    /// Leading zeros of the next chunk's size that were sent before it.
    zeros: usize,
    /// For the client, and not yet sent.
    batch: Vec<u8>,
}

impl Stream {
    /// `head` goes out first.
    pub fn new(is_events: bool, is_chunked: bool, head: Vec<u8>) -> Stream {
        Stream { is_events, is_chunked, batch: head, ..Stream::default() }
    }

    /// The `start` event, which says after how long a silence there is a comment, in seconds.
    pub fn start(&mut self, pid: u32, heartbeat: Duration) {
        let seconds = heartbeat.as_secs_f64();
        self.event("start", format!("\"pid\":{pid},\"heartbeat\":{seconds}}}\n\n"));
    }

    /// The `err` event, which says in words what went wrong.
    pub fn error(&mut self, why: &str) {
        self.text("err", why.as_bytes());
    }

    /// Something to send that says nothing: it keeps the stream alive, and brings out a client that has
    /// gone. Among events it is a comment, with no empty line behind it, which some clients take for an event.
    /// Plain text has none; there it is a leading zero of the next chunk's size, as long as there are few.
    pub fn comment(&mut self) {
        if self.is_events {
            self.content.extend_from_slice(b":\n");
        } else if self.is_chunked && self.content.is_empty() && self.zeros < MOST_ZEROS {
            self.batch.push(b'0');
            self.zeros += 1;
        }
    }

    /// A piece of output: an event, or none where the piece only begins a character.
    pub fn output(&mut self, source: usize, mut piece: Vec<u8>) {
        self.bytes[source] += piece.len() as u64;
        if !self.is_events {
            return self.content.append(&mut piece);
        }
        piece.splice(..0, take(&mut self.unfinished[source]));
        self.unfinished[source] = piece.split_off(piece.len() - unfinished_length(&piece));
        self.text(SOURCES[source], &piece);
    }

    /// The end: what was never completed as a character; the `exit` event, with `out` as its word; the last
    /// chunk, which has the outcome of plain text in its trailer. Returns the numbers as the log has them.
    pub fn exit(&mut self, out: &str, code: Option<i32>, signal: Option<i32>, ms: u128) -> String {
        for (name, begun) in SOURCES.into_iter().zip(take(&mut self.unfinished)) {
            self.text(name, &begun);
        }
        let [stdout, stderr] = self.bytes.map(|bytes| bytes.to_string());
        let numbers = [
            ("code", code.map(|code| code.to_string())),
            ("signal", signal.map(|signal| signal.to_string())),
            ("ms", Some(ms.to_string())),
            ("stdout_bytes", Some(stdout)),
            ("stderr_bytes", Some(stderr)),
        ];
        let (mut json, mut logged) = (format!("\"out\":\"{out}\""), String::new());
        for (name, number) in numbers {
            if let Some(number) = &number {
                logged += &format!(" {name}={number}");
            }
            json += &format!(",\"{name}\":{}", number.as_deref().unwrap_or("null"));
        }
        self.event("exit", json + "}\n\n");
        self.close_chunk();
        if self.is_chunked {
            let trailer = match (code, signal) {
                (Some(code), _) if !self.is_events => format!("Exit-Code: {code}\r\n"),
                (_, Some(signal)) if !self.is_events => format!("Exit-Signal: {signal}\r\n"),
                _ => String::new(),
            };
            self.batch.extend(format!("0\r\n{trailer}\r\n").bytes());
        }
        logged
    }

    /// What is to be sent next: all that was encoded, as one chunk behind what was not sent before.
    pub fn unsent(&mut self) -> &[u8] {
        self.close_chunk();
        &self.batch
    }

    /// Whether nothing is to be sent.
    pub fn is_sent(&self) -> bool {
        self.batch.is_empty() && self.content.is_empty()
    }

    /// Forgets so much of what was to be sent.
    pub fn forget(&mut self, length: usize) {
        self.batch.drain(..length);
    }

    fn close_chunk(&mut self) {
        if !self.is_chunked {
            self.batch.append(&mut self.content);
        } else if !self.content.is_empty() {
            // Writing to a Vec does not fail.
            let _ = write!(self.batch, "{:x}\r\n", self.content.len());
            self.batch.append(&mut self.content);
            self.batch.extend_from_slice(b"\r\n");
            self.zeros = 0;
        }
    }

    /// An event whose `out` is `bytes`, if there are any.
    fn text(&mut self, event: &str, bytes: &[u8]) {
        if self.is_events && !bytes.is_empty() {
            self.event(event, "\"out\":\"");
            decode(bytes, &mut self.content);
            self.content.extend_from_slice(b"\"}\n\n");
        }
    }

    /// An event, or its beginning: what `data` does not close goes on.
    fn event(&mut self, event: &str, data: impl Display) {
        if self.is_events {
            self.last_event += 1;
            let id = format!("{}-{}", unix_millis(), self.last_event);
            let kind = if event == "err" { "error" } else { event };
            let begin = format!("id: {id}\nevent: {event}\ndata: {{\"type\":\"{kind}\",{data}");
            self.content.extend(begin.as_bytes());
        }
    }
}

/// How many bytes at the end are the beginning of a character.
fn unfinished_length(bytes: &[u8]) -> usize {
    let is_begun = |length: &usize| match std::str::from_utf8(&bytes[bytes.len() - length..]) {
        // Nothing is valid, and nothing is known to be wrong either.
        Err(error) => error.valid_up_to() == 0 && error.error_len().is_none(),
        Ok(_) => false,
    };
    (1..=bytes.len().min(3)).find(is_begun).unwrap_or(0)
}

/// Appends `bytes`, decoded (WHATWG Encoding section 8.1.1: one U+FFFD for each maximal part of a character
/// that breaks off, which is how std counts too) and escaped.
fn decode(bytes: &[u8], out: &mut Vec<u8>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => escape(text.as_bytes(), out),
        Err(_) => escape(String::from_utf8_lossy(bytes).as_bytes(), out),
    }
}

/// Appends UTF-8 as the inside of a JSON string (RFC 8259 section 7): `"`, `\` and all below U+0020 escaped,
/// nothing else.
fn escape(mut text: &[u8], out: &mut Vec<u8>) {
    let digit = |number: u8| b"0123456789abcdef"[usize::from(number)];
    loop {
        let (clean, rest) = text.split_at(clean_prefix(text));
        out.extend_from_slice(clean);
        let Some((&byte, rest)) = rest.split_first() else {
            return;
        };
        match byte {
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            _ => {
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
            }
        }
        text = rest;
    }
}

/// How many bytes stand before the first that JSON must escape, eight at a time: 2.5 times the throughput of
/// a search byte by byte, on lines of text.
fn clean_prefix(text: &[u8]) -> usize {
    const ONES: u64 = u64::MAX / 255;
    const TOP_BITS: u64 = ONES << 7;
    // Marks, by its top bit, each byte below `limit`: taking more from it than it holds borrows into that bit.
    // What borrows also takes from the byte above it, which may be marked wrongly then; so the lowest mark
    // is right, and it alone is used. A byte whose top bit was set before is not below any limit here.
    let below = |word: u64, limit: u64| word.wrapping_sub(ONES * limit) & !word & TOP_BITS;
    let mut place = 0;
    while let Some(&word) = text[place..].first_chunk() {
        let word = u64::from_le_bytes(word);
        // Equal bytes are those whose difference, by XOR, is below 1.
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
