//! A command's output as the bytes that go to the client: UTF-8 decoded across reads, escaped for JSON, framed
//! as Server-Sent Events (WHATWG HTML section 9.2) and as chunks (RFC 9112 section 7.1). Bytes in, bytes out;
//! no I/O.

use crate::clock::unix_millis;
use std::{fmt, os::unix::process::ExitStatusExt, time::Duration};
use std::{fmt::Display, io::Write, mem::take, process::ExitStatus};

/// Where output comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Source {
    Stdout,
    Stderr,
}

/// What is sent of one command, behind the response's head.
pub struct Stream {
    /// Events, or plain text.
    is_events: bool,
    /// In chunks, or up to the end of the connection.
    is_chunked: bool,
    /// How many events there were.
    events: u64,
    stdout: Progress,
    stderr: Progress,
    /// Encoded, and not yet made a chunk of.
    content: Vec<u8>,
    /// Leading zeros of the next chunk's size that were sent already.
    zeros: usize,
}

/// How far the output from one source has come.
#[derive(Default)]
struct Progress {
    bytes: u64,
    /// The beginning of a character whose end is still to come, three bytes at most.
    unfinished: Vec<u8>,
}

/// How a run ended, for the client and for the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The word of the event's `out`.
    pub out: &'static str,
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub ms: u128,
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
}

/// Clients take sizes of 16 digits at most, of which a chunk's own size needs a few.
const MOST_ZEROS: usize = 8;

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Source::Stdout => "stdout",
            Source::Stderr => "stderr",
        }
    }
}

impl Outcome {
    /// Of a command that ended by itself, as far as its status tells.
    pub fn of(status: ExitStatus) -> Outcome {
        let out = if status.signal().is_some() { "killed" } else { "exited" };
        Outcome {
            out,
            code: status.code(),
            signal: status.signal(),
            ..Outcome::without_status(out)
        }
    }

    /// Of a command that was never started, by the exit status that a shell would have for it.
    pub fn failed(code: i32) -> Outcome {
        Outcome { code: Some(code), ..Outcome::without_status("failed") }
    }

    /// Of a command whose status nobody knows.
    pub fn without_status(out: &'static str) -> Outcome {
        Outcome { out, code: None, signal: None, ms: 0, stdout_bytes: 0, stderr_bytes: 0 }
    }
}

/// As a line of the log has it.
impl Display for Outcome {
    fn fmt(&self, line: &mut fmt::Formatter) -> fmt::Result {
        write!(line, "out={}", self.out)?;
        if let Some(code) = self.code {
            write!(line, " code={code}")?;
        }
        if let Some(signal) = self.signal {
            write!(line, " signal={signal}")?;
        }
        let (stdout, stderr) = (self.stdout_bytes, self.stderr_bytes);
        write!(line, " ms={} stdout_bytes={stdout} stderr_bytes={stderr}", self.ms)
    }
}

impl Stream {
    pub fn new(is_events: bool, is_chunked: bool) -> Stream {
        Stream {
            is_events,
            is_chunked,
            events: 0,
            stdout: Progress::default(),
            stderr: Progress::default(),
            content: Vec::new(),
            zeros: 0,
        }
    }

    /// The `start` event. `heartbeat` is there in seconds.
    pub fn start(&mut self, pid: u32, heartbeat: Duration) {
        let mut seconds = heartbeat.as_secs().to_string();
        if heartbeat.subsec_millis() > 0 {
            seconds += &format!(".{:03}", heartbeat.subsec_millis());
        }
        let data = format!("\"pid\":{pid},\"heartbeat\":{seconds}}}\n\n");
        self.event("start", "start", data);
    }

    /// The `err` event, which says in words what went wrong.
    pub fn error(&mut self, why: &str) {
        self.text("err", "error", why.as_bytes());
    }

    /// A comment, which keeps a silent stream alive, and brings out a client that has gone. No empty line
    /// follows it, which some clients take for an event.
    pub fn comment(&mut self) {
        if self.is_events {
            self.content.extend_from_slice(b":\n");
        }
    }

    /// The same for plain text, which has no comments: a leading zero of the next chunk's size. Nothing where
    /// there are no chunks, or there were too many zeros already.
    pub fn zero(&mut self, batch: &mut Vec<u8>) {
        if self.is_chunked && self.content.is_empty() && self.zeros < MOST_ZEROS {
            batch.push(b'0');
            self.zeros += 1;
        }
    }

    /// A piece of output: an event, or none where the piece only begins a character.
    pub fn output(&mut self, source: Source, piece: &[u8]) {
        self.progress(source).bytes += piece.len() as u64;
        if !self.is_events {
            return self.content.extend_from_slice(piece);
        }
        let mut carried = take(&mut self.progress(source).unfinished);
        let bytes = if carried.is_empty() {
            piece
        } else {
            carried.extend_from_slice(piece);
            &carried
        };
        let (whole, begun) = bytes.split_at(bytes.len() - unfinished_length(bytes));
        self.progress(source).unfinished = begun.to_vec();
        self.text(source.name(), source.name(), whole);
    }

    /// The end of an event stream: what was never completed as a character, then the `exit` event.
    /// Completes the outcome by the numbers of bytes.
    pub fn exit(&mut self, outcome: &mut Outcome) {
        outcome.stdout_bytes = self.stdout.bytes;
        outcome.stderr_bytes = self.stderr.bytes;
        for source in [Source::Stdout, Source::Stderr] {
            let begun = take(&mut self.progress(source).unfinished);
            self.text(source.name(), source.name(), &begun);
        }
        let number = |number: Option<i32>| number.map_or("null".to_string(), |n| n.to_string());
        let data = format!(
            "\"out\":\"{}\",\"code\":{},\"signal\":{},\"ms\":{},\"stdout_bytes\":{},\"stderr_bytes\":{}}}\n\n",
            outcome.out,
            number(outcome.code),
            number(outcome.signal),
            outcome.ms,
            outcome.stdout_bytes,
            outcome.stderr_bytes,
        );
        self.event("exit", "exit", data);
    }

    /// Moves all that was encoded to `batch`, as one chunk.
    pub fn take_content(&mut self, batch: &mut Vec<u8>) {
        if self.content.is_empty() {
            return;
        }
        if self.is_chunked {
            let _ = write!(batch, "{:x}\r\n", self.content.len());
            batch.append(&mut self.content);
            batch.extend_from_slice(b"\r\n");
            self.zeros = 0;
        } else {
            batch.append(&mut self.content);
        }
    }

    /// The last chunk, with the outcome of plain text as its trailer.
    pub fn take_last_chunk(&mut self, outcome: &Outcome, batch: &mut Vec<u8>) {
        if !self.is_chunked {
            return;
        }
        let trailer = match (outcome.code, outcome.signal) {
            _ if self.is_events => String::new(),
            (Some(code), _) => format!("Exit-Code: {code}\r\n"),
            (_, Some(signal)) => format!("Exit-Signal: {signal}\r\n"),
            (None, None) => String::new(),
        };
        let _ = write!(batch, "0\r\n{trailer}\r\n");
    }

    fn progress(&mut self, source: Source) -> &mut Progress {
        match source {
            Source::Stdout => &mut self.stdout,
            Source::Stderr => &mut self.stderr,
        }
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
            self.events += 1;
            let (millis, number) = (unix_millis(), self.events);
            // Writing to a Vec does not fail.
            let _ = write!(
                self.content,
                "id: {millis}-{number}\nevent: {event}\ndata: {{\"type\":\"{kind}\",{data}"
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
