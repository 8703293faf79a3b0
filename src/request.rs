//! HTTP/1.x requests by the strict grammar of RFC 9112: what it does not allow is refused, never mended,
//! since two programs that mend a message in different ways are how requests are smuggled.

use crate::refusal::Refusal::{self, Malformed};
use std::io::{self, BufRead, ErrorKind, Read};

/// The longest request line, without its CRLF: room for a long command, percent-encoded.
const LONGEST_LINE: usize = 8 << 10;
/// The longest head, from the request line to the empty line.
const LONGEST_HEAD: usize = 16 << 10;
const MOST_FIELDS: usize = 100;
/// A number above this is signed elsewhere, and could mean another length there.
const LONGEST_CONTENT: u64 = i64::MAX as u64;
/// Optional whitespace (RFC 9110 section 5.6.3).
const OWS: [char; 2] = [' ', '\t'];

const LINE: Refusal = Malformed("request line", "send METHOD /path HTTP/1.1");
const FIELD: Refusal = Malformed("field", "send Name: value");
const LINE_END: Refusal = Malformed("line end", "end each line of the head with CRLF");
const CUT: Refusal = Malformed("request", "it breaks off before the empty line");
const LENGTH: Refusal = Malformed("Content-Length", "send one number of bytes");
const HOST: Refusal = Malformed("request", "HTTP/1.1 needs exactly one Host");

/// What was sent: the request line and the fields, and nothing that was decided about them.
#[derive(Default)]
pub struct Request {
    pub method: String,
    /// The path and the query, as sent.
    pub target: String,
    /// HTTP/1.0 is 0; anything else speaks HTTP/1.1.
    pub minor_version: u8,
    /// Bytes of content that follow the head.
    pub content_length: u64,
    /// Names in lower case, values without the whitespace around them. A byte is a character: bytes beyond
    /// ASCII are not decoded.
    fields: Vec<(String, String)>,
}

/// Why there is no request.
#[derive(Debug, PartialEq)]
pub enum Failure {
    /// The connection ended, or stayed silent, before one began; or it failed.
    Gone,
    Refused(Refusal),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure::Refused(refusal)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        match error.kind() {
            ErrorKind::TimedOut => {
                Failure::Refused(Refusal::Late("request did not arrive in time"))
            }
            _ => Failure::Gone,
        }
    }
}

impl Request {
    /// Reads a head into an empty request, which keeps what was read also where the rest is refused, for
    /// the log. One empty line before it is skipped (RFC 9112 section 2.2).
    pub fn read(&mut self, input: &mut impl BufRead) -> Result<(), Failure> {
        match input.fill_buf() {
            Ok(begun) if !begun.is_empty() => {}
            _ => return Err(Failure::Gone),
        }
        let mut line = read_line(input, LONGEST_LINE, Refusal::LineTooLong)?;
        if line.is_empty() {
            line = read_line(input, LONGEST_LINE, Refusal::LineTooLong)?;
        }
        self.parse_line(&line)?;
        // The two line ends that are always there: the request line's, and the empty line.
        let mut room = LONGEST_HEAD - line.len() - 4;
        loop {
            let line = read_line(input, room, Refusal::HeadTooLarge)?;
            if line.is_empty() {
                break;
            }
            if self.fields.len() == MOST_FIELDS {
                return Err(Refusal::HeadTooLarge.into());
            }
            room = room.checked_sub(line.len() + 2).ok_or(Refusal::HeadTooLarge)?;
            self.fields.push(parse_field(&line)?);
        }
        self.check_framing()?;
        Ok(())
    }

    pub fn path(&self) -> &str {
        let (path, _) = self.target.split_once('?').unwrap_or((&self.target, ""));
        path
    }

    /// What follows the `?`.
    pub fn query(&self) -> &str {
        let (_, query) = self.target.split_once('?').unwrap_or((&self.target, ""));
        query
    }

    /// The values of every field of that name, given in lower case, in order.
    pub fn values(&self, name: &str) -> Vec<&str> {
        let mut values = Vec::new();
        for (other, value) in &self.fields {
            if other == name {
                values.push(value.as_str());
            }
        }
        values
    }

    /// The elements of a list field (RFC 9110 section 5.6.1), in lower case.
    pub fn elements(&self, name: &str) -> Vec<String> {
        let mut elements = Vec::new();
        for value in self.values(name) {
            for element in value.split(',') {
                elements.push(element.trim_matches(OWS).to_ascii_lowercase());
            }
        }
        elements
    }

    /// Whether `Accept` names that very media type, and not with a weight of 0 (RFC 9110 section 12.5.1).
    pub fn accepts(&self, media_type: &str) -> bool {
        for element in self.elements("accept") {
            let mut parts = element.split(';').map(|part| part.trim_matches(OWS));
            if parts.next() == Some(media_type) {
                let weight = parts.find_map(|part| part.strip_prefix("q="));
                let digits = weight.unwrap_or("1");
                return digits.bytes().any(|digit| matches!(digit, b'1'..=b'9'));
            }
        }
        false
    }

    /// Events, unless plain text is named, and neither they nor anything at all.
    pub fn wants_events(&self) -> bool {
        let admits_events = self.accepts("text/event-stream") || self.accepts("*/*");
        admits_events || !self.accepts("text/plain")
    }

    /// Whether the client waits to be told before it sends its content (RFC 9110 section 10.1.1).
    pub fn expects_continue(&self) -> bool {
        let has_content = self.content_length > 0;
        has_content && self.minor_version > 0 && !self.values("expect").is_empty()
    }

    /// Whether the connection ends with the answer: after content where a message ends could be a matter of
    /// opinion, and a next request smuggled.
    pub fn ends_connection(&self) -> bool {
        let closes = self.elements("connection").iter().any(|element| element == "close");
        closes || self.minor_version == 0 || self.content_length > 0
    }

    /// RFC 9112 section 3; of the targets only a path.
    fn parse_line(&mut self, line: &[u8]) -> Result<(), Refusal> {
        let line = std::str::from_utf8(line).map_err(|_| LINE)?;
        let parts: Vec<&str> = line.split(' ').collect();
        let [method, target, version] = parts[..] else {
            return Err(LINE);
        };
        let is_path = target.starts_with('/') && target.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_token(method) || !is_path {
            return Err(LINE);
        }
        self.minor_version = match version.as_bytes() {
            [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor @ b'0'..=b'9'] => minor - b'0',
            [b'H', b'T', b'T', b'P', b'/', b'0'..=b'9', b'.', b'0'..=b'9'] => {
                return Err(Refusal::Version);
            }
            _ => return Err(LINE),
        };
        self.method = method.to_string();
        self.target = target.to_string();
        Ok(())
    }

    /// How the content is delimited, if there is any (RFC 9112 section 6), and what the client expects.
    fn check_framing(&mut self) -> Result<(), Refusal> {
        if !self.values("transfer-encoding").is_empty() {
            return Err(Refusal::TransferEncoding);
        }
        self.content_length = match self.values("content-length")[..] {
            [] => 0,
            [length] if !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit()) => {
                let length = length.parse().map_err(|_| LENGTH)?;
                if length > LONGEST_CONTENT {
                    return Err(LENGTH);
                }
                length
            }
            _ => return Err(LENGTH),
        };
        let is_other = |element: &String| element != "100-continue";
        if self.minor_version > 0 && self.elements("expect").iter().any(is_other) {
            return Err(Refusal::Expectation);
        }
        let hosts = self.values("host").len();
        if hosts > 1 || (hosts == 0 && self.minor_version > 0) {
            return Err(HOST);
        }
        Ok(())
    }
}

/// A line without its CRLF; `too_long` where it has more than `limit` bytes.
fn read_line(
    input: &mut impl BufRead,
    limit: usize,
    too_long: Refusal,
) -> Result<Vec<u8>, Failure> {
    let mut line = Vec::new();
    let longest = limit + 2;
    input.take(longest as u64).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        let is_cut = line.len() + 1 < longest;
        return Err(if is_cut { CUT } else { too_long }.into());
    }
    if line.pop() != Some(b'\r') || line.contains(&b'\r') {
        return Err(LINE_END.into());
    }
    Ok(line)
}

/// A field line (RFC 9112 section 5): no space before the colon, no line folding, no controls but the tab.
fn parse_field(line: &[u8]) -> Result<(String, String), Refusal> {
    let text: String = line.iter().map(|&byte| char::from(byte)).collect();
    let (name, value) = text.split_once(':').ok_or(FIELD)?;
    let is_control = |character: char| character.is_ascii_control() && character != '\t';
    if !is_token(name) || value.contains(is_control) {
        return Err(FIELD);
    }
    let value = value.trim_matches(OWS).to_string();
    Ok((name.to_ascii_lowercase(), value))
}

/// RFC 9110 section 5.6.2.
fn is_token(text: &str) -> bool {
    let is_good = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    !text.is_empty() && text.chars().all(is_good)
}

/// The fields of a query, or of `application/x-www-form-urlencoded` content (WHATWG URL section 5.1):
/// names and values, decoded. Nothing between two `&` is a field without a name; `None` where a
/// percent-escape is malformed.
pub fn form_fields(form: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut fields = Vec::new();
    if form.is_empty() {
        return Some(fields);
    }
    for field in form.split(|&byte| byte == b'&') {
        let mut halves = field.splitn(2, |&byte| byte == b'=');
        let name = percent_decode(halves.next().unwrap_or_default())?;
        let value = percent_decode(halves.next().unwrap_or_default())?;
        fields.push((name, value));
    }
    Some(fields)
}

/// A `+` is a space. `None` where a percent-escape is malformed.
pub fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
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

#[cfg(test)]
mod tests;
