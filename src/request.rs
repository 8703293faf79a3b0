//! HTTP/1.x requests, by the strict grammar of RFC 9112: what it does not allow is refused, never mended, since two programs that mend
//! a message in different ways are how requests are smuggled.
//!
//! A `Head` is filled in as it is read, so that the log can name the target of one that breaks off.

use Answer::{Bad, HeadTooLarge, Malformed};
use std::io::{BufRead, BufReader, ErrorKind, Read};

/// The longest request line, without its CRLF: room for a long command, percent-encoded.
const LONGEST_LINE: usize = 8 << 10;
/// The longest head.
const LONGEST_HEAD: usize = 16 << 10;
const MOST_FIELDS: usize = 100;
/// The longest line with a chunk's size, extensions included, or with a trailer field.
const LONGEST_CHUNK_LINE: usize = 1 << 10;
/// Of input: a silent stream holds one. Most heads fit; content passes through in pieces of this size, which a pipe that is ready
/// takes whole (PIPE_BUF).
const BUFFER: usize = 1 << 10;
/// Bytes left of content whose end is unknown, since it is malformed or breaks off.
pub const ENDLESS: u64 = u64::MAX;
/// Optional whitespace (RFC 9110 section 5.6.3).
const OWS: [char; 2] = [' ', '\t'];

/// The request line and the fields, and what every answer to them depends on.
#[derive(Default)]
pub struct Head {
    pub method: String,
    /// As sent, for the log.
    pub target: String,
    /// The authority of an absolute-form target, which overrules `Host` (RFC 9112 section 3.2.2).
    pub authority: Option<String>,
    pub path: String,
    pub query: String,
    /// The minor version: 0 for HTTP/1.0, anything else speaks HTTP/1.1.
    pub minor: u8,
    /// The allowed origin of another site's page, which may then read the answer.
    pub origin: Option<String>,
    /// The connection ends with the answer.
    pub close: bool,
    /// Names in lower case, values without the whitespace around them. A byte is a character: bytes beyond ASCII are not decoded.
    fields: Vec<(String, String)>,
}

/// A connection's input, at a place in a request's content (RFC 9112 sections 6 and 7). The next request follows in it.
pub struct Content<R> {
    pub input: BufReader<R>,
    /// Bytes left of the content, or of the current chunk, as far as the client said so.
    pub left: u64,
    /// What follows them.
    next: Next,
    /// The beginning of a line whose end is still to come.
    line: Vec<u8>,
    /// `Expect: 100-continue`, and the client has not been told to go on.
    pub awaits_continue: bool,
}

/// What follows in the input when nothing is left of the content, or of a chunk.
#[derive(PartialEq)]
enum Next {
    Request,
    ChunkSize,
    ChunkEnd,
    /// Trailer fields, after so many.
    Trailer(usize),
}

/// Every answer but a command's output. `response` knows the status of each.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// None: the connection failed, or ended before a request began.
    Gone,
    Page,
    /// The methods of the path.
    Options(&'static str),
    /// The head of what GET would get.
    Head,
    /// A reconnect of an event stream that has ended.
    Repeated,
    Late,
    /// Not HTTP: where the next request begins is unknown.
    Malformed(&'static str),
    LineTooLong,
    HeadTooLarge,
    Version,
    Coding,
    Expectation,
    /// Understood, but not good.
    Bad(&'static str),
    Misdirected,
    Forbidden(&'static str),
    NoSuchPath,
    /// Not for this path, which has the methods listed.
    Method(&'static str),
    UnknownMethod,
    Token,
    ContentTooLarge,
    /// A command that could not be started: the exit status by which a shell says so (XCU 2.8.2), and why.
    NotStarted(i32, String),
    Busy(&'static str),
}

pub type Result<T = ()> = std::result::Result<T, Answer>;

/// An error with `otherwise`, unless it is so.
pub fn ensure(is_so: bool, otherwise: Answer) -> Result {
    if is_so { Ok(()) } else { Err(otherwise) }
}

impl Head {
    /// The values of every field of that name, in order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let fields = self.fields.iter().filter(|field| field.0 == name);
        fields.map(|field| field.1.as_str()).collect()
    }

    /// Whether one of a list field's elements is `element`, case and parameters aside.
    pub fn lists(&self, name: &str, element: &str) -> bool {
        let elements = self.split(name, &[',', ';']);
        elements.iter().any(|each| each == element)
    }

    /// Events, unless plain text is asked for and they are not (RFC 9110 section 12.5.1).
    pub fn wants_events(&self) -> bool {
        self.lists("accept", "text/event-stream") || !self.lists("accept", "text/plain")
    }

    /// The parts of a field's values, in lower case.
    fn split(&self, name: &str, separators: &[char]) -> Vec<String> {
        let values = self.all(name);
        let parts = values.iter().flat_map(|value| value.split(separators));
        let parts = parts.map(|part| part.trim_matches(OWS));
        parts.map(str::to_ascii_lowercase).collect()
    }

    /// RFC 9112 section 3.
    fn parse_line(&mut self, line: &str) -> Result {
        let parts: Vec<&str> = line.split(' ').collect();
        let [method, target, version] = parts[..] else {
            return Err(MALFORMED_LINE);
        };
        let is_visible = target.bytes().all(|byte| byte.is_ascii_graphic());
        ensure(is_token(method) && is_visible, MALFORMED_LINE)?;
        self.minor = match version.strip_prefix("HTTP/").map(str::as_bytes) {
            Some([b'1', b'.', minor @ b'0'..=b'9']) => minor - b'0',
            Some([b'0'..=b'9', b'.', b'0'..=b'9']) => return Err(Answer::Version),
            _ => return Err(MALFORMED_LINE),
        };
        let prefix = target.get(..7).unwrap_or_default();
        let is_absolute = prefix.eq_ignore_ascii_case("http://");
        let rest = if is_absolute { &target[7..] } else { target };
        let (authority, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = match (is_absolute, authority, method) {
            (true, _, "OPTIONS") | (false, "*", "OPTIONS") if rest.is_empty() => "*",
            (false, _, "CONNECT") if rest.is_empty() => "*",
            (true, ..) if path.is_empty() => "/",
            (true, ..) | (false, "", _) if path.starts_with('/') => path,
            _ => return Err(MALFORMED_LINE),
        };
        self.authority = is_absolute.then(|| authority.to_string());
        let owned = [method, target, path, query].map(str::to_string);
        [self.method, self.target, self.path, self.query] = owned;
        Ok(())
    }
}

const MALFORMED_LINE: Answer = Malformed("malformed request line");
const MALFORMED_FIELD: Answer = Malformed("malformed field");
const MALFORMED_CHUNK: Answer = Malformed("malformed chunk or transfer coding");
const BREAKS_OFF: Answer = Malformed("request breaks off");

impl<R: Read> Content<R> {
    pub fn new(input: R) -> Content<R> {
        let input = BufReader::with_capacity(BUFFER, input);
        Content {
            input,
            left: 0,
            next: Next::Request,
            line: Vec::new(),
            awaits_continue: false,
        }
    }

    /// Who sends it.
    pub fn client(&self) -> &R {
        self.input.get_ref()
    }

    /// Reads the next head into `head`, an empty one. One empty line before it is skipped (RFC 9112
    /// section 2.2); the connection's end there is `Gone`.
    pub fn read_head(&mut self, head: &mut Head) -> Result {
        let begun = fill(&mut self.input).map(drop);
        ensure(begun != Err(BREAKS_OFF), Answer::Gone)?;
        let mut line = self.line(LONGEST_LINE, Answer::LineTooLong)?;
        if line.is_empty() {
            line = self.line(LONGEST_LINE, Answer::LineTooLong)?;
        }
        head.parse_line(&line)?;
        let mut room = LONGEST_HEAD - line.len() - 4;
        loop {
            line = self.line(room, HeadTooLarge)?;
            if line.is_empty() {
                return self.set_framing(head);
            }
            ensure(head.fields.len() < MOST_FIELDS, HeadTooLarge)?;
            head.fields.push(field(&line)?);
            let rest = room.checked_sub(line.chars().count() + 2);
            room = rest.ok_or(HeadTooLarge)?;
        }
    }

    /// How the content is delimited, if there is any (RFC 9112 section 6.3), and what the client expects of the server before it sends
    /// it (RFC 9110 section 10.1.1).
    fn set_framing(&mut self, head: &mut Head) -> Result {
        let is_old = head.minor == 0;
        // RFC 9112 section 9.3.
        head.close = is_old || head.lists("connection", "close");
        let lengths = head.all("content-length");
        ensure(lengths.len() < 2, Malformed("more than one Content-Length"))?;
        let length = lengths.first().map_or(Some(0), |length| number(length, 10));
        self.left = length.ok_or(Malformed("malformed Content-Length"))?;
        let codings = head.split("transfer-encoding", &[',']);
        self.next = Next::Request;
        if !codings.is_empty() {
            self.next = Next::ChunkSize;
            ensure(!is_old, Malformed("Transfer-Encoding in HTTP/1.0"))?;
            ensure(lengths.is_empty(), Malformed("two lengths of the content"))?;
            // The content would go on after its own end.
            let goes_on = codings.iter().rev().skip(1).any(|it| it == "chunked");
            ensure(!goes_on, MALFORMED_CHUNK)?;
            ensure(codings == ["chunked"], Answer::Coding)?;
            // A chunk that has come with the head is looked at before anything is started.
            if !self.input.buffer().is_empty() {
                self.advance()?;
            }
        }
        let expected = head.split("expect", &[',']);
        self.awaits_continue = !is_old && !expected.is_empty();
        let is_met = expected.iter().all(|each| each == "100-continue");
        ensure(is_old || is_met, Answer::Expectation)
    }

    pub fn is_at_end(&self) -> bool {
        self.left == 0 && self.next == Next::Request
    }

    /// Whether more content is to come.
    pub fn goes_on(&self) -> bool {
        !self.is_at_end() && self.left != ENDLESS
    }

    /// Reads the content to its end and passes it on, piece by piece. More than `room` bytes are too many, at once where the client
    /// says so beforehand.
    pub fn read(&mut self, mut room: u64, mut pass_on: impl FnMut(&[u8])) -> Result {
        loop {
            self.advance()?;
            ensure(self.left <= room, Answer::ContentTooLarge)?;
            let piece = self.piece()?;
            let length = piece.len();
            if length == 0 {
                return Ok(());
            }
            pass_on(piece);
            self.consume(length);
            room -= length as u64;
        }
    }

    /// The next piece of the content, to be consumed; empty at its end. Reading that fails for want of time can go on later.
    pub fn piece(&mut self) -> Result<&[u8]> {
        self.advance()?;
        if self.left == 0 {
            return Ok(&[]);
        }
        let piece = fill(&mut self.input)?;
        Ok(&piece[..self.left.min(piece.len() as u64) as usize])
    }

    pub fn consume(&mut self, length: usize) {
        self.input.consume(length);
        self.left -= length as u64;
    }

    /// Goes on to the next chunk's content, or to the end (RFC 9112 section 7.1). Extensions and trailer fields are read and ignored.
    fn advance(&mut self) -> Result {
        while self.left == 0 && self.next != Next::Request {
            // A chunk's content has nothing but the line's end after it.
            let limit = LONGEST_CHUNK_LINE * usize::from(self.next != Next::ChunkEnd);
            let line = self.line(limit, MALFORMED_CHUNK)?;
            self.next = match self.next {
                Next::ChunkSize => {
                    let end = line.find([' ', '\t', ';']).unwrap_or(line.len());
                    let (size, rest) = line.split_at(end);
                    let is_extension = rest.trim_start_matches(OWS).starts_with(';');
                    ensure(rest.is_empty() || is_extension, MALFORMED_CHUNK)?;
                    ensure(is_text(rest), MALFORMED_CHUNK)?;
                    self.left = number(size, 16).ok_or(MALFORMED_CHUNK)?;
                    match self.left {
                        0 => Next::Trailer(0),
                        _ => Next::ChunkEnd,
                    }
                }
                Next::ChunkEnd if line.is_empty() => Next::ChunkSize,
                Next::Trailer(_) if line.is_empty() => Next::Request,
                Next::Trailer(before) if before < MOST_FIELDS && field(&line).is_ok() => {
                    Next::Trailer(before + 1)
                }
                _ => return Err(MALFORMED_CHUNK),
            };
        }
        Ok(())
    }

    /// A line without its CRLF, each byte as the character of that number; `too_long` when more than `limit` bytes come before that.
    fn line(&mut self, limit: usize, too_long: Answer) -> Result<String> {
        loop {
            let byte = fill(&mut self.input)?[0];
            self.input.consume(1);
            match (self.line.last(), byte) {
                (Some(b'\r'), b'\n') => {
                    self.line.pop();
                    let line = std::mem::take(&mut self.line);
                    return Ok(line.into_iter().map(char::from).collect());
                }
                (Some(b'\r'), _) | (_, b'\n') => return Err(Malformed("bare CR or LF")),
                _ if self.line.len() == limit && byte != b'\r' => return Err(too_long),
                _ => self.line.push(byte),
            }
        }
    }
}

/// A field line (RFC 9112 section 5): no space before the colon, no line folding, no controls.
fn field(line: &str) -> Result<(String, String)> {
    let (name, value) = line.split_once(':').ok_or(MALFORMED_FIELD)?;
    ensure(is_token(name) && is_text(value), MALFORMED_FIELD)?;
    let value = value.trim_matches(OWS).to_string();
    Ok((name.to_ascii_lowercase(), value))
}

/// The one value of `name` in `application/x-www-form-urlencoded` (WHATWG URL section 5.1, but a broken percent-escape is refused).
/// Names that do not decode are nobody's.
pub fn form_value(form: &[u8], name: &[u8]) -> Result<Option<Vec<u8>>> {
    let mut found = None;
    for pair in form.split(|&byte| byte == b'&') {
        let mut halves = pair.splitn(2, |&byte| byte == b'=');
        let mut half = || percent_decode(halves.next().unwrap_or_default());
        if half().as_deref() == Some(name) {
            let value = half().ok_or(Bad("malformed percent-escape in command"))?;
            ensure(found.replace(value).is_none(), Bad("more than one command"))?;
        }
    }
    Ok(found)
}

fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(&byte) = bytes.next() {
        let mut digit = || char::from(*bytes.next()?).to_digit(16);
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => (digit()? << 4 | digit()?) as u8,
            other => other,
        });
    }
    Some(decoded)
}

/// Digits alone: no sign, as std has it.
fn number(digits: &str, radix: u32) -> Option<u64> {
    let is_plain = digits.chars().all(|digit| digit.is_digit(radix));
    u64::from_str_radix(digits, radix).ok().filter(|_| is_plain)
}

/// RFC 9110 section 5.6.2.
fn is_token(text: &str) -> bool {
    let is_good = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    !text.is_empty() && text.chars().all(is_good)
}

/// No controls but the tab (RFC 9110 section 5.5).
fn is_text(text: &str) -> bool {
    text.chars().all(|c| c == '\t' || !c.is_ascii_control())
}

/// What there is to read, once there is something; the end is too early.
fn fill(input: &mut impl BufRead) -> Result<&[u8]> {
    match input.fill_buf() {
        Ok([]) => Err(BREAKS_OFF),
        Ok(available) => Ok(available),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err(Answer::Late),
        Err(_) => Err(Answer::Gone),
    }
}

#[cfg(test)]
mod tests;
