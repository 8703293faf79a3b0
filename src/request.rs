//! HTTP/1.x requests, by the strict grammar of RFC 9112: what it does not allow is refused, never mended, since two programs that mend
//! a message in different ways are how requests are smuggled.
//!
//! A `Request` is filled in as it is read, so that the log can name the target of one that breaks off.

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
    pub query: Option<String>,
    /// The minor version: 0 for HTTP/1.0, anything else speaks HTTP/1.1.
    pub minor: u8,
    /// Names in lower case; values without the whitespace around them.
    fields: Vec<(String, Vec<u8>)>,
    pub content: Content,
    /// `Expect: 100-continue`, and the client has not been told to go on.
    pub awaits_continue: bool,
}

/// What remains to be read of a request's content (RFC 9112 sections 6 and 7).
#[derive(Default)]
pub struct Content {
    /// Bytes left of the content, or of the current chunk.
    left: u64,
    chunks: Chunks,
}

#[derive(Default, PartialEq)]
enum Chunks {
    /// `Content-Length`, or nothing more to come.
    #[default]
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
    /// The head, or the content's framing, is not HTTP: where the next request begins is unknown.
    Malformed(&'static str),
    LineTooLong,
    HeadTooLarge,
    Version,
    Coding,
    Host(&'static str),
    Expectation,
    Misdirected(&'static str),
    Forbidden(&'static str),
    NoSuchPath,
    /// Not for this path, which has the methods listed.
    Method(&'static str),
    UnknownMethod,
    Token,
    Command(&'static str),
    FormTooLarge,
    /// A reconnect of an event stream that has ended.
    Repeated,
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
            Gone | Late | Malformed(_) | LineTooLong | HeadTooLarge | Version | Coding
        )
    }
}

impl Request {
    /// Reads a head. Empty lines before it are skipped as far as RFC 9112 section 2.2 asks: one.
    pub fn read(&mut self, input: &mut impl BufRead) -> Result<(), Refusal> {
        let mut left = LONGEST_HEAD;
        let mut line = read_line(input, LONGEST_LINE, Refusal::LineTooLong)?;
        if line.is_empty() {
            line = read_line(input, LONGEST_LINE, Refusal::LineTooLong)?;
        }
        self.request_line(&line)?;
        left -= line.len() + 2;
        loop {
            let line = read_line(input, left.saturating_sub(2), Refusal::HeadTooLarge)?;
            left = left.saturating_sub(line.len() + 2);
            if line.is_empty() {
                break;
            }
            if self.fields.len() == MOST_FIELDS {
                return Err(Refusal::HeadTooLarge);
            }
            self.fields.push(field_line(&line)?);
        }
        self.framing()
    }

    /// The value of a field that is given once, or the first.
    pub fn field(&self, name: &'static str) -> Option<&[u8]> {
        self.all(name).next()
    }

    /// The values of every field of that name, in order.
    pub fn all(&self, name: &'static str) -> impl Iterator<Item = &[u8]> {
        self.fields
            .iter()
            .filter(move |field| field.0 == name)
            .map(|field| field.1.as_slice())
    }

    /// Whether one of a list field's elements is `element`, case and parameters aside.
    pub fn lists(&self, name: &'static str, element: &str) -> bool {
        let mut elements = self
            .all(name)
            .flat_map(|value| value.split(|&byte| byte == b','));
        elements.any(|each| {
            let name = each.split(|&byte| byte == b';').next().unwrap_or_default();
            name.trim_ascii().eq_ignore_ascii_case(element.as_bytes())
        })
    }

    /// Whether the connection ends with the answer to this (RFC 9112 section 9.3).
    pub fn wants_close(&self) -> bool {
        self.minor == 0 || self.lists("connection", "close")
    }

    /// RFC 9112 section 3.
    fn request_line(&mut self, line: &[u8]) -> Result<(), Refusal> {
        const MALFORMED: Refusal = Refusal::Malformed("malformed request line");
        let mut parts = line.split(|&byte| byte == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(MALFORMED);
        };
        if target.is_empty() || !target.iter().all(u8::is_ascii_graphic) {
            return Err(Refusal::Malformed(
                "malformed request target: it is visible ASCII, the rest percent-encoded",
            ));
        }
        self.target = text(target);
        if !is_token(method) {
            return Err(MALFORMED);
        }
        self.method = text(method);
        let [
            b'H',
            b'T',
            b'T',
            b'P',
            b'/',
            major @ b'0'..=b'9',
            b'.',
            minor @ b'0'..=b'9',
        ] = *version
        else {
            return Err(MALFORMED);
        };
        if major != b'1' {
            return Err(Refusal::Version);
        }
        self.minor = minor - b'0';
        self.split_target()
    }

    /// RFC 9112 section 3.2: origin-form, absolute-form, authority-form (for CONNECT) and asterisk-form (for OPTIONS).
    fn split_target(&mut self) -> Result<(), Refusal> {
        let mut rest = self.target.as_str();
        if let Some((scheme, after)) = rest.split_once("://").filter(|_| !rest.starts_with('/')) {
            if !scheme.eq_ignore_ascii_case("http") {
                return Err(Refusal::Malformed(
                    "malformed request target: its scheme is not http",
                ));
            }
            let end = after.find(['/', '?']).unwrap_or(after.len());
            self.authority = Some(after[..end].to_string());
            rest = &after[end..];
        } else if !(rest.starts_with('/')
            || self.method == "CONNECT"
            || (rest == "*" && self.method == "OPTIONS"))
        {
            return Err(Refusal::Malformed(
                "malformed request target: it begins with / or http://",
            ));
        }
        let (path, query) = rest.split_once('?').map_or((rest, None), |(path, query)| {
            (path, Some(query.to_string()))
        });
        let path = match (path, &self.method[..]) {
            ("", "OPTIONS") if query.is_none() => "*",
            (_, "CONNECT") => "*",
            ("", _) => "/",
            _ => path,
        };
        (self.path, self.query) = (path.to_string(), query);
        Ok(())
    }

    /// How the content is delimited, if there is any (RFC 9112 section 6.3), and what the client expects (RFC 9110 section 10.1.1).
    fn framing(&mut self) -> Result<(), Refusal> {
        let malformed = |why| Err(Refusal::Malformed(why));
        let lengths: Vec<&[u8]> = self.all("content-length").collect();
        let codings = self
            .all("transfer-encoding")
            .flat_map(|value| value.split(|&byte| byte == b','));
        let codings: Vec<&[u8]> = codings.map(<[u8]>::trim_ascii).collect();
        let chunked = |coding: &&[u8]| coding.eq_ignore_ascii_case(b"chunked");
        let content = match (&lengths[..], &codings[..]) {
            ([], []) => Content::default(),
            ([length], []) => {
                let digits = std::str::from_utf8(length)
                    .ok()
                    .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
                match digits.and_then(|digits| digits.parse().ok()) {
                    Some(left) => Content {
                        left,
                        chunks: Chunks::None,
                    },
                    None => return malformed("malformed Content-Length"),
                }
            }
            (_, []) => return malformed("more than one Content-Length"),
            ([], _) if self.minor == 0 => return malformed("Transfer-Encoding in HTTP/1.0"),
            ([], [only]) if chunked(only) => Content {
                left: 0,
                chunks: Chunks::First,
            },
            // The content would go on after its own end.
            ([], [before @ .., _]) if before.iter().any(chunked) => {
                return malformed("chunked is not the last transfer coding");
            }
            ([], _) => return Err(Refusal::Coding),
            _ => return malformed("both Content-Length and Transfer-Encoding"),
        };
        self.awaits_continue = self.minor > 0 && self.lists("expect", "100-continue");
        self.content = content;
        Ok(())
    }

    /// An `Expect` that asks for more than `100-continue`. HTTP/1.0 has none.
    pub fn expectation(&self) -> Result<(), Refusal> {
        let met = self
            .all("expect")
            .all(|value| value.eq_ignore_ascii_case(b"100-continue"));
        if met || self.minor == 0 {
            Ok(())
        } else {
            Err(Refusal::Expectation)
        }
    }
}

impl Content {
    pub fn is_at_end(&self) -> bool {
        self.left == 0 && self.chunks == Chunks::None
    }

    /// How much there will be, where the client said so.
    pub fn known_length(&self) -> Option<u64> {
        (self.chunks == Chunks::None).then_some(self.left)
    }

    /// Whether what has come of it by now shows that it is malformed: a chunk's size that is none.
    pub fn begins_malformed(&self, buffered: &[u8]) -> bool {
        let line = buffered
            .split(|&byte| byte == b'\n')
            .next()
            .unwrap_or_default();
        let whole = line.len() < buffered.len() || line.len() > LONGEST_CHUNK_LINE;
        self.chunks == Chunks::First
            && whole
            && line.strip_suffix(b"\r").and_then(chunk_size).is_none()
    }

    /// The next piece, borrowed from the input and taken from it by [`Content::take`]; empty at the end.
    pub fn next<'a>(&mut self, input: &'a mut impl BufRead) -> Result<&'a [u8], Refusal> {
        if self.left == 0 && self.chunks != Chunks::None {
            self.next_chunk(input)?;
        }
        if self.left == 0 {
            return Ok(&[]);
        }
        let available = fill(input)?;
        if available.is_empty() {
            return Err(Refusal::Malformed("content breaks off"));
        }
        let length =
            usize::try_from(self.left).map_or(available.len(), |left| left.min(available.len()));
        Ok(&available[..length])
    }

    /// Takes `length` bytes of the piece that [`Content::next`] showed.
    pub fn take(&mut self, input: &mut impl BufRead, length: usize) {
        input.consume(length);
        self.left -= length as u64;
    }

    /// RFC 9112 section 7.1. Extensions and trailer fields are read and ignored.
    fn next_chunk(&mut self, input: &mut impl BufRead) -> Result<(), Refusal> {
        const MALFORMED: Refusal = Refusal::Malformed("malformed chunk");
        if self.chunks == Chunks::Next && !read_line(input, 0, MALFORMED)?.is_empty() {
            return Err(MALFORMED);
        }
        let line = read_line(input, LONGEST_CHUNK_LINE, MALFORMED)?;
        self.left = chunk_size(&line).ok_or(MALFORMED)?;
        self.chunks = Chunks::Next;
        if self.left == 0 {
            let mut left = LONGEST_HEAD;
            loop {
                let line = read_line(input, left, Refusal::Malformed("trailer section too large"))?;
                if line.is_empty() {
                    break;
                }
                field_line(&line)?;
                left = left.saturating_sub(line.len() + 2);
            }
            self.chunks = Chunks::None;
        }
        Ok(())
    }
}

/// Decodes `application/x-www-form-urlencoded` and gives the one value of `name` (WHATWG URL section 5.1, but a broken
/// percent-escape in it is refused). Names that do not decode are nobody's.
pub fn form_value(form: &[u8], name: &str) -> Result<Option<Vec<u8>>, Refusal> {
    let mut found = None;
    for pair in form.split(|&byte| byte == b'&') {
        let mut halves = pair.splitn(2, |&byte| byte == b'=');
        let key = halves.next().and_then(percent_decode);
        if key.as_deref() != Some(name.as_bytes()) {
            continue;
        }
        if found.is_some() {
            return Err(Refusal::Command("more than one command"));
        }
        let value = percent_decode(halves.next().unwrap_or_default());
        found = Some(value.ok_or(Refusal::Command("malformed percent-escape in command"))?);
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
    (digit as char).to_digit(16).map(|value| value as u8)
}

/// `1*HEXDIG`, then perhaps extensions. 16 digits fill a u64.
fn chunk_size(line: &[u8]) -> Option<u64> {
    let end = line
        .iter()
        .position(|byte| !byte.is_ascii_hexdigit())
        .unwrap_or(line.len());
    let (digits, rest) = line.split_at(end);
    let extension = rest.trim_ascii_start();
    if digits.is_empty()
        || digits.len() > 16
        || !(rest.is_empty() || extension.starts_with(b";"))
        || !is_text(rest)
    {
        return None;
    }
    Some(digits.iter().fold(0, |size, &digit| {
        size << 4 | u64::from(hex(digit).unwrap_or(0))
    }))
}

/// RFC 9112 section 5: no space before the colon, no line folding, no controls.
fn field_line(line: &[u8]) -> Result<(String, Vec<u8>), Refusal> {
    const MALFORMED: Refusal = Refusal::Malformed("malformed field");
    let colon = line
        .iter()
        .position(|&byte| byte == b':')
        .ok_or(MALFORMED)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if !is_token(name) || !is_text(value) {
        return Err(MALFORMED);
    }
    let whitespace = |byte: &&u8| !matches!(byte, b' ' | b'\t');
    let start = value
        .iter()
        .position(|byte| whitespace(&byte))
        .unwrap_or(value.len());
    let end = value
        .iter()
        .rposition(|byte| whitespace(&byte))
        .map_or(start, |last| last + 1);
    Ok((text(name).to_ascii_lowercase(), value[start..end].to_vec()))
}

/// RFC 9110 section 5.6.2.
fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

/// Visible characters, blanks and bytes beyond ASCII (RFC 9110 section 5.5).
fn is_text(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .all(|&byte| byte == b'\t' || (byte >= b' ' && byte != 0x7f))
}

/// Of bytes that were found to be ASCII.
fn text(ascii: &[u8]) -> String {
    String::from_utf8_lossy(ascii).into_owned()
}

/// A line without its CRLF; `too_long` when more than `limit` bytes come before that. Nothing at all before the end of the input is
/// `Gone`. A bare CR or LF is malformed.
fn read_line(
    input: &mut impl BufRead,
    limit: usize,
    too_long: Refusal,
) -> Result<Vec<u8>, Refusal> {
    let mut line = Vec::new();
    loop {
        let available = fill(input)?;
        if available.is_empty() {
            return Err(if line.is_empty() {
                Refusal::Gone
            } else {
                Refusal::Malformed("head breaks off")
            });
        }
        // The CRLF may follow a line of full length.
        let room = limit + 2 - line.len();
        let end = available.iter().take(room).position(|&byte| byte == b'\n');
        let taken = end.map_or(available.len().min(room), |end| end + 1);
        line.extend_from_slice(&available[..taken]);
        input.consume(taken);
        let body = line.len() - usize::from(end.is_some());
        // A CR may stand only right before the LF, or at the end of what has come so far.
        if line[..body]
            .iter()
            .position(|&byte| byte == b'\r')
            .is_some_and(|place| place + 1 < body)
        {
            return Err(Refusal::Malformed("bare CR"));
        }
        if end.is_some() {
            line.truncate(body);
            return if line.pop() == Some(b'\r') {
                Ok(line)
            } else {
                Err(Refusal::Malformed("bare LF"))
            };
        }
        if line.len() >= limit + 2 {
            return Err(too_long);
        }
    }
}

fn fill(input: &mut impl BufRead) -> Result<&[u8], Refusal> {
    input.fill_buf().map_err(|error| match error.kind() {
        ErrorKind::TimedOut => Refusal::Late,
        _ => Refusal::Gone,
    })
}
