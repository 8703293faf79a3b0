//! HTTP/1.x requests by the strict grammar of RFC 9112: what it does not allow is refused, never mended,
//! since two programs that mend a message in different ways are how requests are smuggled.

use crate::refusal::{self, Refusal, ensure};
use std::io::{BufRead, Read};

/// The longest request line, without its CRLF: room for a long command, percent-encoded.
const LONGEST_LINE: usize = 8 << 10;
/// The longest head, from the request line to the empty line.
const LONGEST_HEAD: usize = 16 << 10;
const MOST_FIELDS: usize = 100;
/// A number above this is signed elsewhere, and could mean another length there.
const LONGEST_CONTENT: u64 = i64::MAX as u64;
/// Optional whitespace (RFC 9110 section 5.6.3).
const OWS: [char; 2] = [' ', '\t'];

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

impl Request {
    /// Reads a head into an empty request, which keeps what was read also where the rest is refused, for
    /// the log. One empty line before it is skipped (RFC 9112 section 2.2).
    pub fn read(&mut self, input: &mut impl BufRead) -> Result<(), Refusal> {
        match input.fill_buf() {
            Ok(begun) if !begun.is_empty() => {}
            _ => return Err(refusal::GONE),
        }
        let mut line = read_line(input, LONGEST_LINE, refusal::LONG_LINE)?;
        if line.is_empty() {
            line = read_line(input, LONGEST_LINE, refusal::LONG_LINE)?;
        }
        self.parse_line(&line)?;
        // The two line ends that are always there: the request line's, and the empty line.
        let mut room = LONGEST_HEAD - line.len() - 4;
        loop {
            let line = read_line(input, room, refusal::LONG_HEAD)?;
            if line.is_empty() {
                break;
            }
            ensure(self.fields.len() < MOST_FIELDS, refusal::LONG_HEAD)?;
            room = room.checked_sub(line.len() + 2).ok_or(refusal::LONG_HEAD)?;
            self.fields.push(parse_field(&line)?);
        }
        self.check_framing()?;
        Ok(())
    }

    /// The target's path, and its query as bytes, both as sent.
    pub fn path_and_query(&self) -> (&str, &[u8]) {
        let (path, query) = self.target.split_once('?').unwrap_or((&self.target, ""));
        (path, query.as_bytes())
    }

    /// The values of every field of that name, given in lower case, in order.
    pub fn values(&self, name: &str) -> Vec<&str> {
        let named = self.fields.iter().filter(|field| field.0 == name);
        named.map(|field| field.1.as_str()).collect()
    }

    /// The elements of a list field (RFC 9110 section 5.6.1), in lower case.
    pub fn elements(&self, name: &str) -> Vec<String> {
        let list = self.values(name).join(",").to_ascii_lowercase();
        list.split(',').map(|element| element.trim_matches(OWS).to_string()).collect()
    }

    /// Whether `Accept` names that very media type, and not with a weight of 0 (RFC 9110 section 12.5.1).
    pub fn accepts(&self, media_type: &str) -> bool {
        let names = |element: &String| {
            let mut parts = element.split(';').map(|part| part.trim_matches(OWS));
            let is_it = parts.next() == Some(media_type);
            let weight = parts.find_map(|part| part.strip_prefix("q=")).unwrap_or("1");
            is_it && weight.contains(|digit| matches!(digit, '1'..='9'))
        };
        self.elements("accept").iter().any(names)
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
        let line = std::str::from_utf8(line).map_err(|_| refusal::LINE)?;
        let parts: Vec<&str> = line.split(' ').collect();
        let [method, target, version] = parts[..] else {
            return Err(refusal::LINE);
        };
        let is_path = target.starts_with('/') && target.bytes().all(|byte| byte.is_ascii_graphic());
        ensure(is_token(method) && is_path, refusal::LINE)?;
        self.minor_version = match version.strip_prefix("HTTP/").map(str::as_bytes) {
            Some([b'1', b'.', minor @ b'0'..=b'9']) => minor - b'0',
            Some([b'0'..=b'9', b'.', b'0'..=b'9']) => return Err(refusal::VERSION),
            _ => return Err(refusal::LINE),
        };
        (self.method, self.target) = (method.to_string(), target.to_string());
        Ok(())
    }

    /// How the content is delimited, if there is any (RFC 9112 section 6), what the client expects, and that
    /// it says which host it means.
    fn check_framing(&mut self) -> Result<(), Refusal> {
        ensure(self.values("transfer-encoding").is_empty(), refusal::NO_LENGTH)?;
        self.content_length = match self.values("content-length")[..] {
            [] => 0,
            [length] if is_digits(length) => length.parse().map_err(|_| refusal::LENGTH)?,
            _ => return Err(refusal::LENGTH),
        };
        ensure(self.content_length <= LONGEST_CONTENT, refusal::LENGTH)?;
        let is_old = self.minor_version == 0;
        let expectations = self.elements("expect");
        let is_met = |element: &String| element.is_empty() || element == "100-continue";
        ensure(is_old || expectations.iter().all(is_met), refusal::EXPECT)?;
        match self.values("host").len() {
            0 if is_old => Ok(()),
            1 => Ok(()),
            _ => Err(refusal::HOST),
        }
    }
}

/// A line without its CRLF; `too_long` where it has more than `limit` bytes.
fn read_line(
    input: &mut impl BufRead,
    limit: usize,
    too_long: Refusal,
) -> Result<Vec<u8>, Refusal> {
    let mut line = Vec::new();
    let longest = limit + 2;
    input.take(longest as u64).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        let is_cut = line.len() + 1 < longest;
        return Err(if is_cut { refusal::CUT } else { too_long });
    }
    if line.pop() != Some(b'\r') || line.contains(&b'\r') {
        return Err(refusal::LINE_END);
    }
    Ok(line)
}

/// A field line (RFC 9112 section 5): no space before the colon, no line folding, no controls but the tab.
fn parse_field(line: &[u8]) -> Result<(String, String), Refusal> {
    let text: String = line.iter().map(|&byte| char::from(byte)).collect();
    let (name, value) = text.split_once(':').ok_or(refusal::FIELD)?;
    let is_control = |character: char| character.is_ascii_control() && character != '\t';
    ensure(is_token(name) && !value.contains(is_control), refusal::FIELD)?;
    let value = value.trim_matches(OWS).to_string();
    Ok((name.to_ascii_lowercase(), value))
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// RFC 9110 section 5.6.2.
fn is_token(text: &str) -> bool {
    let is_good = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    !text.is_empty() && text.chars().all(is_good)
}

/// The fields of a query, or of `application/x-www-form-urlencoded` content (WHATWG URL section 5.1):
/// names and values, decoded. What stands between two `&` is a field, even nothing. `None` where a
/// percent-escape is malformed.
pub fn form_fields(form: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut fields = Vec::new();
    for field in form.split(|&byte| byte == b'&') {
        let mut halves = field.splitn(2, |&byte| byte == b'=');
        let mut half = || percent_decode(halves.next().unwrap_or_default());
        fields.push((half()?, half()?));
    }
    if form.is_empty() { Some(Vec::new()) } else { Some(fields) }
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
