//! HTTP/1.x requests, by the strict grammar of RFC 9112: what it does not allow is refused, never mended, since two programs that mend
//! a message in different ways are how requests are smuggled.
//!
//! A `Request` is filled in as it is read, so that the log can name the target of one that breaks off.

use Refusal::{Bad, Malformed};
use std::cmp::Ordering;
use std::io::{BufRead, ErrorKind};

/// The longest request line, without its CRLF: room for a long command, percent-encoded.
const LONGEST_LINE: usize = 8 << 10;
/// The longest head, and the longest trailer section.
const LONGEST_HEAD: usize = 16 << 10;
const MOST_FIELDS: usize = 100;
/// The longest line with a chunk's size, extensions included.
const LONGEST_CHUNK_LINE: usize = 1 << 10;

#[derive(Default)]
pub struct Request {
    pub method: String,
    /// As sent, for the log.
    pub target: String,
    /// The authority of an absolute-form target, which overrules `Host` (RFC 9112 section 3.2.2).
    pub authority: Option<String>,
    pub path: String,
    pub query: String,
    /// The minor version: 0 for HTTP/1.0, anything else speaks HTTP/1.1.
    pub minor: u8,
    /// Names in lower case, values without the whitespace around them. A byte is a character: bytes beyond ASCII are not decoded.
    fields: Vec<(String, String)>,
}

/// The bytes of a connection, and where in a request's content they stand (RFC 9112 sections 6 and 7).
pub struct Incoming<R> {
    pub input: R,
    /// Bytes left of the content, or of the current chunk.
    left: u64,
    chunks: Chunks,
    /// `Expect: 100-continue`, and the client has not been told to go on.
    pub awaits_continue: bool,
}

#[derive(PartialEq)]
enum Chunks {
    /// `Content-Length`, or nothing more to come.
    None,
    First,
    Next,
}

/// Why a request is not carried out. `response` knows the status of each.
#[derive(Debug, PartialEq)]
pub enum Refusal {
    /// The connection failed, or ended before a request began: nobody is there to be told.
    Gone,
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
    /// A reconnect of an event stream that has ended.
    Repeated,
    FormTooLarge,
    NoProgram(String),
    CannotRun(String),
    Busy(&'static str),
}

impl Refusal {
    /// Whether the rest of the connection cannot be understood any more.
    pub fn breaks_framing(&self) -> bool {
        use Refusal::*;
        matches!(
            self,
            Late | Malformed(_) | LineTooLong | HeadTooLarge | Version | Coding
        )
    }
}

impl Request {
    /// The values of every field of that name, in order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let fields = self.fields.iter().filter(|field| field.0 == name);
        fields.map(|field| field.1.as_str()).collect()
    }

    /// Whether one of a list field's elements is `element`, case and parameters aside.
    pub fn lists(&self, name: &str, element: &str) -> bool {
        let list = self.all(name).join(",");
        let mut names = list.split(',').filter_map(|each| each.split(';').next());
        names.any(|name| name.trim().eq_ignore_ascii_case(element))
    }

    /// Whether the connection ends with the answer to this (RFC 9112 section 9.3).
    pub fn wants_close(&self) -> bool {
        self.minor == 0 || self.lists("connection", "close")
    }

    /// RFC 9112 section 3.
    fn set_request_line(&mut self, line: &str) -> Result<(), Refusal> {
        let parts: Vec<&str> = line.split(' ').collect();
        let [method, target, version] = parts[..] else {
            return Err(Malformed("malformed request line"));
        };
        self.target = target.to_string();
        self.method = method.to_string();
        if !is_token(method) || target.is_empty() || !target.chars().all(|c| c.is_ascii_graphic()) {
            return Err(Malformed(
                "malformed request line: the target is to be percent-encoded",
            ));
        }
        match version.strip_prefix("HTTP/").map(str::as_bytes) {
            Some([b'1', b'.', minor @ b'0'..=b'9']) => self.minor = minor - b'0',
            Some([b'0'..=b'9', b'.', b'0'..=b'9']) => return Err(Refusal::Version),
            _ => return Err(Malformed("malformed HTTP version")),
        }
        self.set_target(target)
    }

    /// RFC 9112 section 3.2: origin-form, absolute-form, authority-form for CONNECT, asterisk-form for OPTIONS.
    fn set_target(&mut self, target: &str) -> Result<(), Refusal> {
        let mut rest = target;
        if target
            .get(..7)
            .is_some_and(|scheme| scheme.eq_ignore_ascii_case("http://"))
        {
            let end = target[7..]
                .find(['/', '?'])
                .map_or(target.len(), |end| 7 + end);
            self.authority = Some(target[7..end].to_string());
            rest = &target[end..];
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        self.query = query.to_string();
        self.path = match (path, self.method.as_str()) {
            _ if path.starts_with('/') => path,
            ("*", "OPTIONS") | (_, "CONNECT") => "*",
            ("", "OPTIONS") if query.is_empty() => "*",
            ("", _) => "/",
            _ => {
                return Err(Malformed(
                    "malformed request target: it begins with / or http://",
                ));
            }
        }
        .to_string();
        Ok(())
    }
}

impl<R: BufRead> Incoming<R> {
    pub fn new(input: R) -> Incoming<R> {
        Incoming {
            input,
            left: 0,
            chunks: Chunks::None,
            awaits_continue: false,
        }
    }

    /// Reads a head. One empty line before it is skipped (RFC 9112 section 2.2).
    pub fn read_head(&mut self, request: &mut Request) -> Result<(), Refusal> {
        let mut line = self.line(LONGEST_LINE, Refusal::LineTooLong)?;
        if line.is_empty() {
            line = self.line(LONGEST_LINE, Refusal::LineTooLong)?;
        }
        request.set_request_line(&line)?;
        request.fields = self.fields(LONGEST_HEAD - line.len() - 2, Refusal::HeadTooLarge)?;
        self.set_framing(request)
    }

    /// How the content is delimited, if there is any (RFC 9112 section 6.3), and what the client expects of the server before it sends
    /// it (RFC 9110 section 10.1.1).
    fn set_framing(&mut self, request: &Request) -> Result<(), Refusal> {
        let lengths = request.all("content-length");
        let codings = request
            .all("transfer-encoding")
            .join(",")
            .to_ascii_lowercase();
        let codings: Vec<&str> = codings.split(',').map(str::trim).collect();
        self.left = match (&lengths[..], &codings[..]) {
            ([], _) => 0,
            ([length], [""]) => decimal(length).ok_or(Malformed("malformed Content-Length"))?,
            (_, [""]) => return Err(Malformed("more than one Content-Length")),
            _ => return Err(Malformed("both Content-Length and Transfer-Encoding")),
        };
        self.chunks = match codings[..] {
            [""] => Chunks::None,
            _ if request.minor == 0 => return Err(Malformed("Transfer-Encoding in HTTP/1.0")),
            ["chunked"] => Chunks::First,
            // The content would go on after its own end.
            [ref before @ .., _] if before.contains(&"chunked") => {
                return Err(Malformed("chunked is not the last transfer coding"));
            }
            _ => return Err(Refusal::Coding),
        };
        let expectations = request.all("expect");
        let known = |expected: &&str| expected.eq_ignore_ascii_case("100-continue");
        if request.minor > 0 && !expectations.iter().all(known) {
            return Err(Refusal::Expectation);
        }
        self.awaits_continue = request.minor > 0 && !expectations.is_empty();
        Ok(())
    }

    pub fn is_at_end(&self) -> bool {
        self.left == 0 && self.chunks == Chunks::None
    }

    /// How many bytes of content are still to come, as far as the client said so.
    pub fn known_length(&self) -> u64 {
        self.left
    }

    /// Whether what has come by now, `buffered`, shows that the content is malformed: a chunk's size that is none.
    pub fn begins_malformed(&self, buffered: &[u8]) -> bool {
        let end = buffered.windows(2).position(|pair| pair == b"\r\n");
        let line = end.map(|end| latin1(&buffered[..end]));
        self.chunks == Chunks::First && line.is_some_and(|line| chunk_size(&line).is_none())
    }

    /// The next piece of content, to be taken by [`Incoming::take`]; empty at its end.
    pub fn piece(&mut self) -> Result<&[u8], Refusal> {
        if self.left == 0 && self.chunks != Chunks::None {
            self.next_chunk()?;
        }
        if self.left == 0 {
            return Ok(&[]);
        }
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        match fill(&mut self.input)? {
            [] => Err(Malformed("content breaks off")),
            available => Ok(&available[..available.len().min(left)]),
        }
    }

    /// Takes `length` bytes of the piece that [`Incoming::piece`] showed.
    pub fn take(&mut self, length: usize) {
        self.input.consume(length);
        self.left -= length as u64;
    }

    /// RFC 9112 section 7.1. Extensions and trailer fields are read and ignored.
    fn next_chunk(&mut self) -> Result<(), Refusal> {
        const MALFORMED: Refusal = Malformed("malformed chunk");
        if self.chunks == Chunks::Next && !self.line(0, MALFORMED)?.is_empty() {
            return Err(MALFORMED);
        }
        let line = self.line(LONGEST_CHUNK_LINE, MALFORMED)?;
        self.left = chunk_size(&line).ok_or(MALFORMED)?;
        self.chunks = Chunks::Next;
        if self.left == 0 {
            self.fields(LONGEST_HEAD, MALFORMED)?;
            self.chunks = Chunks::None;
        }
        Ok(())
    }

    /// Field lines up to the empty line (RFC 9112 section 5): no space before the colon, no line folding, no controls.
    fn fields(&mut self, mut room: usize, full: Refusal) -> Result<Vec<(String, String)>, Refusal> {
        let mut fields = Vec::new();
        loop {
            let Some(limit) = room.checked_sub(2) else {
                return Err(full);
            };
            let line = match self.line(limit, Refusal::HeadTooLarge) {
                Err(Refusal::HeadTooLarge) => return Err(full),
                line => line?,
            };
            if line.is_empty() {
                return Ok(fields);
            }
            room = limit - line.len();
            match line.split_once(':') {
                _ if fields.len() == MOST_FIELDS => return Err(full),
                Some((name, value)) if is_token(name) && is_text(value) => {
                    let value = value.trim_matches([' ', '\t']);
                    fields.push((name.to_ascii_lowercase(), value.to_string()));
                }
                _ => return Err(Malformed("malformed field")),
            }
        }
    }

    /// A line without its CRLF; `too_long` when more than `limit` bytes come before that.
    fn line(&mut self, limit: usize, too_long: Refusal) -> Result<String, Refusal> {
        let mut line = Vec::new();
        loop {
            // The CRLF may follow a line of full length.
            let room = limit + 2 - line.len();
            let available = match fill(&mut self.input)? {
                [] if line.is_empty() => return Err(Refusal::Gone),
                [] => return Err(Malformed("request breaks off")),
                available => &available[..available.len().min(room)],
            };
            let end = available.iter().position(|&byte| byte == b'\n');
            let taken = end.map_or(available.len(), |end| end + 1);
            line.extend_from_slice(&available[..taken]);
            self.input.consume(taken);
            let cr = line
                .iter()
                .position(|&byte| byte == b'\r')
                .unwrap_or(line.len());
            match (cr + 2).cmp(&line.len()) {
                _ if end.is_some() && line[cr..] == *b"\r\n" => return Ok(latin1(&line[..cr])),
                _ if end.is_some() => return Err(Malformed("bare CR or LF")),
                Ordering::Less => return Err(Malformed("bare CR")),
                _ if line.len() == limit + 2 => return Err(too_long),
                _ => {}
            }
        }
    }
}

/// The one value of `name` in `application/x-www-form-urlencoded` (WHATWG URL section 5.1, but a broken percent-escape is refused).
/// Names that do not decode are nobody's.
pub fn form_value(form: &[u8], name: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
    let mut found = None;
    for pair in form.split(|&byte| byte == b'&') {
        let mut halves = pair.splitn(2, |&byte| byte == b'=');
        let mut half = || percent_decode(halves.next().unwrap_or_default());
        if half().as_deref() == Some(name) {
            let value = half().ok_or(Bad("malformed percent-escape in command"))?;
            if found.replace(value).is_some() {
                return Err(Bad("more than one command"));
            }
        }
    }
    Ok(found)
}

fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(&byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => hex(*bytes.next()?)? << 4 | hex(*bytes.next()?)?,
            other => other,
        });
    }
    Some(decoded)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

fn decimal(digits: &str) -> Option<u64> {
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| plain)
}

/// `1*HEXDIG`, then perhaps extensions.
fn chunk_size(line: &str) -> Option<u64> {
    let (digits, extension) = line.split_once(';').unwrap_or((line, ""));
    let digits = if extension.is_empty() {
        digits
    } else {
        digits.trim_end_matches([' ', '\t'])
    };
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    u64::from_str_radix(digits, 16)
        .ok()
        .filter(|_| plain && is_text(extension))
}

/// RFC 9110 section 5.6.2.
fn is_token(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(good)
}

/// No controls but the tab (RFC 9110 section 5.5).
fn is_text(text: &str) -> bool {
    text.chars().all(|c| c == '\t' || !c.is_ascii_control())
}

/// Each byte as the character of that number.
fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| char::from(byte)).collect()
}

fn fill(input: &mut impl BufRead) -> Result<&[u8], Refusal> {
    input.fill_buf().map_err(|error| match error.kind() {
        ErrorKind::TimedOut => Refusal::Late,
        _ => Refusal::Gone,
    })
}
