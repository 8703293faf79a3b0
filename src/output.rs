//! A command's output as the bytes that go to the client: UTF-8 decoded across reads, escaped for JSON, framed
//! as Server-Sent Events (WHATWG HTML section 9.2) and as chunks (RFC 9112 section 7.1). Bytes in, bytes out;
//! no I/O.

use crate::clock::unix_millis;
use std::os::unix::process::ExitStatusExt;
use std::{fmt::Display, io::Write, mem::take, process::ExitStatus, time::Duration};

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
    pub bytes: [u64; 2],
    /// The number of the last event.
    last_event: u64,
    /// Of each source the beginning of a character whose end is still to come, three bytes at most.
    unfinished: [Vec<u8>; 2],
    /// Encoded, and not yet made a chunk of.
    content: Vec<u8>,
    /// Leading zeros of the next chunk's size that were sent before it.
    zeros: usize,
    /// For the client, of which so many bytes were sent.
    batch: Vec<u8>,
    sent: usize,
}

impl Stream {
    /// `head` goes out first.
    pub fn new(is_events: bool, is_chunked: bool, head: Vec<u8>) -> Stream {
        Stream { is_events, is_chunked, batch: head, ..Stream::default() }
    }

    /// The `start` event, which says after how long a silence there is a comment, in seconds.
    pub fn start(&mut self, pid: u32, heartbeat: Duration) {
        let (seconds, millis) = (heartbeat.as_secs(), heartbeat.subsec_millis());
        let fraction = if millis > 0 { format!(".{millis:03}") } else { String::new() };
        self.event(
            "start",
            "start",
            format!("\"pid\":{pid},\"heartbeat\":{seconds}{fraction}}}\n\n"),
        );
    }

    /// The `err` event, which says in words what went wrong.
    pub fn error(&mut self, why: &str) {
        self.text("err", "error", why.as_bytes());
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
    pub fn output(&mut self, source: usize, piece: &[u8]) {
        self.bytes[source] += piece.len() as u64;
        if !self.is_events {
            return self.content.extend_from_slice(piece);
        }
        let mut joined = take(&mut self.unfinished[source]);
        let mut bytes = piece;
        if !joined.is_empty() {
            joined.extend_from_slice(piece);
            bytes = &joined;
        }
        let (whole, begun) = bytes.split_at(bytes.len() - unfinished_length(bytes));
        self.unfinished[source] = begun.to_vec();
        self.text(SOURCES[source], SOURCES[source], whole);
    }

    /// The end: what was never completed as a character; the `exit` event, with `out` as its word; the last
    /// chunk, which has the outcome of plain text in its trailer. There is no status where nobody knows it.
    pub fn exit(&mut self, out: &str, status: Option<ExitStatus>, ms: u128) {
        for (name, begun) in SOURCES.into_iter().zip(take(&mut self.unfinished)) {
            self.text(name, name, &begun);
        }
        let code = status.and_then(|status| status.code());
        let signal = status.and_then(|status| status.signal());
        let json = |number: Option<i32>| number.map_or("null".to_string(), |it| it.to_string());
        let numbers = format!(r#""code":{},"signal":{},"ms":{ms}"#, json(code), json(signal));
        let [stdout, stderr] = self.bytes;
        let bytes = format!(r#""stdout_bytes":{stdout},"stderr_bytes":{stderr}"#);
        self.event("exit", "exit", format!("\"out\":\"{out}\",{numbers},{bytes}}}\n\n"));
        self.close_chunk();
        let trailer = match (code, signal) {
            (Some(code), _) if !self.is_events => format!("Exit-Code: {code}\r\n"),
            (_, Some(signal)) if !self.is_events => format!("Exit-Signal: {signal}\r\n"),
            _ => String::new(),
        };
        if self.is_chunked {
            self.batch.extend(format!("0\r\n{trailer}\r\n").bytes());
        }
    }

    /// What is to be sent next: all that was encoded, as one chunk behind what was not sent before.
    pub fn unsent(&mut self) -> &[u8] {
        self.close_chunk();
        &self.batch[self.sent..]
    }

    /// Whether nothing is to be sent.
    pub fn is_sent(&self) -> bool {
        self.batch.is_empty() && self.content.is_empty()
    }

    /// Forgets so much of what was to be sent.
    pub fn forget(&mut self, length: usize) {
        self.sent += length;
        if self.sent == self.batch.len() {
            self.batch.clear();
            self.sent = 0;
        }
    }

    fn close_chunk(&mut self) {
        let length = self.content.len();
        if length > 0 && self.is_chunked {
            // Writing to a Vec does not fail.
            let _ = write!(self.batch, "{length:x}\r\n");
            self.batch.append(&mut self.content);
            self.batch.extend_from_slice(b"\r\n");
            self.zeros = 0;
        }
        self.batch.append(&mut self.content);
    }

    /// An event whose `out` is `bytes`, if there are any.
    fn text(&mut self, event: &str, kind: &str, bytes: &[u8]) {
        if self.is_events && !bytes.is_empty() {
            self.event(event, kind, "\"out\":\"");
            decode(bytes, &mut self.content);
            self.content.extend_from_slice(b"\"}\n\n");
        }
    }

    /// An event, or its beginning: what `data` does not close goes on.
    fn event(&mut self, event: &str, kind: &str, data: impl Display) {
        if self.is_events {
            self.last_event += 1;
            let id = format!("{}-{}", unix_millis(), self.last_event);
            let _ = write!(
                self.content,
                "id: {id}\nevent: {event}\ndata: {{\"type\":\"{kind}\",{data}"
            );
        }
    }
}

/// How many bytes at the end are the beginning of a character.
fn unfinished_length(bytes: &[u8]) -> usize {
    for length in 1..=bytes.len().min(3) {
        let end = &bytes[bytes.len() - length..];
        if let Err(error) = std::str::from_utf8(end) {
            // Nothing is valid, and nothing is known to be wrong either.
            if error.valid_up_to() == 0 && error.error_len().is_none() {
                return length;
            }
        }
    }
    0
}

/// Appends `bytes`, decoded (WHATWG Encoding section 8.1.1: one U+FFFD for each maximal part of a character
/// that breaks off, which is how std counts too) and escaped.
fn decode(bytes: &[u8], out: &mut Vec<u8>) {
    if std::str::from_utf8(bytes).is_ok() {
        return escape(bytes, out);
    }
    for chunk in bytes.utf8_chunks() {
        // Mostly a few bytes, too short to be searched.
        for byte in chunk.valid().bytes() {
            escape_byte(byte, out);
        }
        if !chunk.invalid().is_empty() {
            out.extend_from_slice("\u{fffd}".as_bytes());
        }
    }
}

/// Appends UTF-8 as the inside of a JSON string (RFC 8259 section 7): `"`, `\` and all below U+0020 escaped,
/// nothing else.
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

fn escape_byte(byte: u8, out: &mut Vec<u8>) {
    match byte {
        b'"' => out.extend_from_slice(b"\\\""),
        b'\\' => out.extend_from_slice(b"\\\\"),
        b'\n' => out.extend_from_slice(b"\\n"),
        b'\r' => out.extend_from_slice(b"\\r"),
        b'\t' => out.extend_from_slice(b"\\t"),
        0..=0x1f => {
            let digit = |number: u8| b"0123456789abcdef"[usize::from(number)];
            out.extend_from_slice(b"\\u00");
            out.extend_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
        }
        _ => out.push(byte),
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
