//! HTTP/1.x requests, by the strict grammar of RFC 9112: what it does not allow is refused, never mended, since two programs that mend
//! a message in different ways are how requests are smuggled.
//!
//! A `Head` is filled in as it is read, so that the log can name the target of one that breaks off.

use crate::output::Format;
use Answer::{Bad, Malformed};
use std::io::{BufRead, ErrorKind};

/// The longest request line, without its CRLF: room for a long command, percent-encoded.
const LONGEST_LINE: usize = 8 << 10;
/// The longest head, and the longest trailer section.
const LONGEST_HEAD: usize = 16 << 10;
const MOST_FIELDS: usize = 100;
/// The longest line with a chunk's size, extensions included.
const LONGEST_CHUNK_LINE: usize = 1 << 10;

/// The request line and the fields.
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
    /// Names in lower case, values without the whitespace around them. A byte is a character: bytes beyond ASCII are not decoded.
    fields: Vec<(String, String)>,
}

/// The input at the place in a request's content where it stands (RFC 9112 sections 6 and 7). The next request follows in it.
pub struct Content<R> {
    pub input: R,
    /// Bytes left of the content, or of the current chunk, as far as the client said so.
    pub left: u64,
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

/// Every answer but a command's output. `response` knows the status of each.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// None: the connection failed, or ended before a request began.
    Gone,
    Page,
    /// The methods of the path.
    Options(&'static str),
    /// The head of what GET would get.
    Head(Format),
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
    FormTooLarge,
    /// A command that could not be started, as what would have been its stream, and why.
    NoProgram(Format, String),
    CannotRun(Format, String),
    Busy(&'static str),
}

pub type Result<T> = std::result::Result<T, Answer>;

impl Head {
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
    fn parse_line(line: &str) -> Result<Head> {
        let parts: Vec<&str> = line.split(' ').collect();
        let [method, target, version] = parts[..] else {
            return Err(MALFORMED_LINE);
        };
        let visible = |c: char| c.is_ascii_graphic();
        if !is_token(method) || target.is_empty() || !target.chars().all(visible) {
            return Err(MALFORMED_LINE);
        }
        let minor = match version.strip_prefix("HTTP/").map(str::as_bytes) {
            Some([b'1', b'.', minor @ b'0'..=b'9']) => minor - b'0',
            Some([b'0'..=b'9', b'.', b'0'..=b'9']) => return Err(Answer::Version),
            _ => return Err(MALFORMED_LINE),
        };
        let (authority, rest) = split_absolute(target);
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = match (path, method) {
            _ if path.starts_with('/') => path,
            ("*", "OPTIONS") | (_, "CONNECT") => "*",
            ("", "OPTIONS") if rest.is_empty() => "*",
            ("", _) => "/",
            _ => return Err(MALFORMED_LINE),
        };
        let [method, target, path, query] = [method, target, path, query].map(str::to_string);
        let authority = authority.map(str::to_string);
        Ok(Head {
            method,
            target,
            authority,
            path,
            query,
            minor,
            fields: Vec::new(),
        })
    }
}

const MALFORMED_LINE: Answer = Malformed("malformed request line");

/// The authority of an absolute-form target, and what follows it (RFC 9112 section 3.2).
fn split_absolute(target: &str) -> (Option<&str>, &str) {
    match target.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            (Some(&rest[..end]), &rest[end..])
        }
        _ => (None, target),
    }
}

impl<R: BufRead> Content<R> {
    pub fn new(input: R) -> Content<R> {
        Content {
            input,
            left: 0,
            chunks: Chunks::None,
            awaits_continue: false,
        }
    }

    /// Reads the next head into `head`, an empty one. One empty line before it is skipped (RFC 9112
    /// section 2.2); the connection's end there is `Gone`.
    pub fn read_head(&mut self, head: &mut Head) -> Result<()> {
        let end = |answer| {
            if answer == BREAKS_OFF {
                Answer::Gone
            } else {
                answer
            }
        };
        let mut line = String::new();
        for _ in 0..2 {
            if line.is_empty() {
                fill(&mut self.input).map_err(end)?;
                line = self.line(LONGEST_LINE, Answer::LineTooLong)?;
            }
        }
        *head = Head::parse_line(&line)?;
        head.fields = self.fields(LONGEST_HEAD - line.len() - 2)?;
        self.set_framing(head)
    }

    /// How the content is delimited, if there is any (RFC 9112 section 6.3), and what the client expects of the server before it sends
    /// it (RFC 9110 section 10.1.1).
    fn set_framing(&mut self, head: &Head) -> Result<()> {
        let old = head.minor == 0;
        let lengths = head.all("content-length");
        let codings = head.all("transfer-encoding").join(",").to_ascii_lowercase();
        let codings: Vec<&str> = codings.split(',').map(str::trim).collect();
        self.left = match (&lengths[..], &codings[..]) {
            ([], _) => 0,
            ([length], [""]) => decimal(length).ok_or(Malformed("malformed Content-Length"))?,
            (_, [""]) => return Err(Malformed("more than one Content-Length")),
            _ => return Err(Malformed("both Content-Length and Transfer-Encoding")),
        };
        self.chunks = match codings.split_last() {
            Some((&"", [])) => Chunks::None,
            _ if old => return Err(Malformed("Transfer-Encoding in HTTP/1.0")),
            Some((&"chunked", [])) => Chunks::First,
            // The content would go on after its own end.
            Some((_, first)) if first.contains(&"chunked") => return Err(MALFORMED_CHUNK),
            _ => return Err(Answer::Coding),
        };
        let expected = head.all("expect");
        let met = |each: &&str| each.eq_ignore_ascii_case("100-continue");
        self.awaits_continue = !old && !expected.is_empty();
        let good = old || expected.iter().all(met);
        if good {
            Ok(())
        } else {
            Err(Answer::Expectation)
        }
    }

    pub fn is_at_end(&self) -> bool {
        self.left == 0 && self.chunks == Chunks::None
    }

    /// Whether what has come by now, `buffered`, shows that the content is malformed: a chunk's size that is none.
    pub fn begins_malformed(&self, buffered: &[u8]) -> bool {
        let end = buffered.windows(2).position(|pair| pair == b"\r\n");
        let line = end.map(|end| latin1(&buffered[..end]));
        self.chunks == Chunks::First && line.is_some_and(|line| chunk_size(&line).is_none())
    }

    /// The next piece of content, to be taken by [`Content::take`]; empty at its end.
    pub fn piece(&mut self) -> Result<&[u8]> {
        if self.left == 0 && self.chunks != Chunks::None {
            self.next_chunk()?;
        }
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        match left {
            0 => Ok(&[]),
            _ => fill(&mut self.input).map(|piece| &piece[..piece.len().min(left)]),
        }
    }

    /// Takes `length` bytes of the piece that [`Content::piece`] showed.
    pub fn take(&mut self, length: usize) {
        self.input.consume(length);
        self.left -= length as u64;
    }

    /// RFC 9112 section 7.1. Extensions and trailer fields are read and ignored.
    fn next_chunk(&mut self) -> Result<()> {
        if self.chunks == Chunks::Next {
            self.line(0, MALFORMED_CHUNK)?;
        }
        let line = self.line(LONGEST_CHUNK_LINE, MALFORMED_CHUNK)?;
        self.left = chunk_size(&line).ok_or(MALFORMED_CHUNK)?;
        self.chunks = Chunks::Next;
        if self.left == 0 {
            self.fields(LONGEST_HEAD).map_err(|_| MALFORMED_CHUNK)?;
            self.chunks = Chunks::None;
        }
        Ok(())
    }

    /// Field lines up to the empty line (RFC 9112 section 5): no space before the colon, no line folding, no controls.
    fn fields(&mut self, mut room: usize) -> Result<Vec<(String, String)>> {
        let mut fields = Vec::new();
        loop {
            room = room.checked_sub(2).ok_or(Answer::HeadTooLarge)?;
            let line = self.line(room, Answer::HeadTooLarge)?;
            room -= line.len();
            match line.split_once(':') {
                _ if line.is_empty() => return Ok(fields),
                _ if fields.len() == MOST_FIELDS => return Err(Answer::HeadTooLarge),
                Some((name, value)) if is_token(name) && is_text(value) => {
                    let value = value.trim_matches([' ', '\t']);
                    fields.push((name.to_ascii_lowercase(), value.to_string()));
                }
                _ => return Err(Malformed("malformed field")),
            }
        }
    }

    /// A line without its CRLF; `too_long` when more than `limit` bytes come before that.
    fn line(&mut self, limit: usize, too_long: Answer) -> Result<String> {
        let mut line = Vec::new();
        loop {
            let available = fill(&mut self.input)?;
            let end = available.iter().position(|&byte| byte == b'\n');
            // The CRLF may follow a line of full length.
            let taken = end.map_or(available.len(), |end| end + 1);
            let taken = taken.min(limit + 2 - line.len());
            line.extend_from_slice(&available[..taken]);
            self.input.consume(taken);
            match line.iter().position(|byte| b"\r\n".contains(byte)) {
                Some(cr) if line[cr..] == *b"\r\n" => return Ok(latin1(&line[..cr])),
                Some(cr) if line[cr..] != *b"\r" => return Err(Malformed("bare CR or LF")),
                _ if line.len() == limit + 2 => return Err(too_long),
                _ => {}
            }
        }
    }
}

const MALFORMED_CHUNK: Answer = Malformed("malformed chunk or transfer coding");
const BREAKS_OFF: Answer = Malformed("request breaks off");

/// The one value of `name` in `application/x-www-form-urlencoded` (WHATWG URL section 5.1, but a broken percent-escape is refused).
/// Names that do not decode are nobody's.
pub fn form_value(form: &[u8], name: &[u8]) -> Result<Option<Vec<u8>>> {
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
    let hex = |digit: u8| char::from(digit).to_digit(16);
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(&byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => (hex(*bytes.next()?)? << 4 | hex(*bytes.next()?)?) as u8,
            other => other,
        });
    }
    Some(decoded)
}

fn decimal(digits: &str) -> Option<u64> {
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| plain)
}

/// `1*HEXDIG`, then perhaps extensions.
fn chunk_size(line: &str) -> Option<u64> {
    let extended = line.split_once(';');
    let (digits, extension) = extended.map_or((line, ""), |(size, rest)| (size.trim_end(), rest));
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit()) && is_text(extension);
    u64::from_str_radix(digits, 16).ok().filter(|_| plain)
}

/// RFC 9110 section 5.6.2.
fn is_token(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    !text.is_empty() && text.chars().all(good)
}

/// No controls but the tab (RFC 9110 section 5.5).
fn is_text(text: &str) -> bool {
    text.chars().all(|c| c == '\t' || !c.is_ascii_control())
}

/// Each byte as the character of that number.
fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| char::from(byte)).collect()
}

/// What there is to read, once there is something; the end is too early.
fn fill(input: &mut impl BufRead) -> Result<&[u8]> {
    match input.fill_buf() {
        Ok([]) => Err(BREAKS_OFF),
        Ok(available) => Ok(available),
        Err(error) if error.kind() == ErrorKind::TimedOut => Err(Answer::Late),
        Err(_) => Err(Answer::Gone),
    }
}

#[cfg(test)]
mod tests;
