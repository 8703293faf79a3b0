//! HTTP/1.x requests by the strict grammar of RFC 9112: what it does not allow is refused, never
//! mended, since two programs that mend a message in different ways are how requests are smuggled.
//! Of what it allows, content in chunks and targets that are no path are not taken.

use crate::refusal::{self, Refusal, ensure, shown};
use std::{collections::BTreeMap, io::BufRead, io::Read, io::Take};

/// The longest request line, without its CRLF: room for a long command, percent-encoded.
const LONGEST_LINE: u64 = 8 << 10;
/// The longest head, from the request line to the empty line.
const LONGEST_HEAD: u64 = 16 << 10;
const MOST_FIELDS: usize = 100;
const LARGEST_FORM: u64 = 64 << 10;
const FORM_TYPE: &str = "application/x-www-form-urlencoded";

/// What was sent, and nothing that was decided about it.
#[derive(Default)]
pub struct Request {
    pub method: String,
    /// The path and the query, as sent.
    pub target: String,
    /// HTTP/1.0 is 0; anything else speaks HTTP/1.1.
    pub minor_version: u8,
    /// Bytes of content that follow the head.
    pub content_length: u64,
    /// The head has arrived whole and was understood, so it is known where the next request begins.
    is_understood: bool,
    /// The content, where it was read since it holds the command.
    pub form: Vec<u8>,
    /// Names in lower case, values without the whitespace around them, both as Latin-1.
    fields: BTreeMap<String, String>,
}

impl Request {
    /// Reads the head of a new request. What was read before an error stays in it, for the log. One
    /// empty line before it is skipped (RFC 9112 section 2.2).
    pub fn read(&mut self, input: &mut impl BufRead) -> Result<(), Refusal> {
        let mut head = input.take(LONGEST_LINE + 2);
        let mut line = read_line(&mut head, refusal::LONG_LINE)?;
        if line.is_empty() {
            line = read_line(&mut head, refusal::LONG_LINE)?;
        }
        self.parse_line(&line)?;
        // What is left to the head, of which the line and its CRLF are a part.
        head.set_limit(LONGEST_HEAD - line.len() as u64 - 2);
        // The empty line is one more.
        for _ in 0..=MOST_FIELDS {
            let line = read_line(&mut head, refusal::LONG_HEAD)?;
            if line.is_empty() {
                self.check_framing()?;
                self.is_understood = true;
                return Ok(());
            }
            self.parse_field(&line)?;
        }
        Err(refusal::LONG_HEAD)
    }

    /// The target's path, and its query, both as sent.
    pub fn path_and_query(&self) -> (&str, &str) {
        self.target.split_once('?').unwrap_or((&self.target, ""))
    }

    /// The value of the field of that name, given in lower case. Several fields of one name are one
    /// that has a list (RFC 9110 section 5.3), so that no second one escapes a comparison.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }

    /// Whether `Accept` names that very media type, and not with a weight of 0 (RFC 9110 section
    /// 12.5.1).
    pub fn accepts(&self, media_type: &str) -> bool {
        let list = self.field("accept").unwrap_or_default().to_ascii_lowercase();
        let is_zero = |part: &str| part.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0));
        list.split(',').any(|element| {
            let mut parts = element.split(';').map(str::trim_ascii);
            parts.next() == Some(media_type) && !parts.any(is_zero)
        })
    }

    /// Plain text is sent only where `Accept` names it, and neither `text/event-stream` nor `*/*`.
    pub fn wants_events(&self) -> bool {
        self.accepts("text/event-stream") || self.accepts("*/*") || !self.accepts("text/plain")
    }

    /// Whether the client waits to be told before it sends its content (RFC 9110 section 10.1.1).
    pub fn expects_continue(&self) -> bool {
        self.content_length > 0 && self.minor_version > 0 && self.field("expect").is_some()
    }

    /// Whether the connection ends with the answer. It does after any content: where the next
    /// request begins is then never a matter of opinion, by which one could be smuggled.
    pub fn ends_connection(&self) -> bool {
        let list = self.field("connection").unwrap_or_default().to_ascii_lowercase();
        let closes = list.split(',').any(|element| element.trim_ascii() == "close");
        closes || self.minor_version == 0 || self.content_length > 0 || !self.is_understood
    }

    /// Whether it asks to go on with what has ended: the reconnect of an `EventSource`; or the rest
    /// of an answer that broke off, for which wget asks by `Range`.
    pub fn is_reconnect(&self) -> bool {
        self.field("last-event-id").is_some_and(|id| !id.is_empty())
            || self.field("range").is_some()
    }

    /// Whether the content can be the form that holds the command. No content type counts as a
    /// form's.
    pub fn check_form(&self) -> Result<(), Refusal> {
        let value = self.field("content-type").unwrap_or(FORM_TYPE);
        let (media_type, _) = value.split_once(';').unwrap_or((value, ""));
        ensure(media_type.trim_ascii().eq_ignore_ascii_case(FORM_TYPE), refusal::FORM)?;
        ensure(self.content_length <= LARGEST_FORM, refusal::LONG_FORM)
    }

    /// RFC 9112 section 3; of the targets only a path. It may hold characters that RFC 3986 has
    /// escaped, since browsers and people send some of them as they are; but not `#`, behind which
    /// others would cut it.
    fn parse_line(&mut self, line: &[u8]) -> Result<(), Refusal> {
        let line = std::str::from_utf8(line).map_err(|_| refusal::LINE)?;
        let parts: Vec<&str> = line.split(' ').collect();
        let [method, target, version] = parts[..] else { return Err(refusal::LINE) };
        let is_of_target = |c: char| c.is_ascii_graphic() && c != '#';
        let is_path = target.starts_with('/') && target.chars().all(is_of_target);
        ensure(is_token(method) && is_path, refusal::LINE)?;
        self.minor_version = match version.strip_prefix("HTTP/").map(str::as_bytes) {
            Some([b'1', b'.', minor @ b'0'..=b'9']) => minor - b'0',
            Some([b'0'..=b'9', b'.', b'0'..=b'9']) => return Err(refusal::VERSION),
            _ => return Err(refusal::LINE),
        };
        (self.method, self.target) = (method.to_string(), target.to_string());
        Ok(())
    }

    /// RFC 9112 section 5: no space before the colon, no line folding, no controls but the tab.
    fn parse_field(&mut self, line: &[u8]) -> Result<(), Refusal> {
        let line: String = line.iter().map(|&byte| char::from(byte)).collect();
        let (name, value) = line.split_once(':').ok_or(refusal::FIELD)?;
        let is_control = |character: char| character.is_ascii_control() && character != '\t';
        ensure(is_token(name) && !value.contains(is_control), refusal::FIELD)?;
        let (name, value) = (name.to_ascii_lowercase(), value.trim_ascii());
        match self.fields.get_mut(&name) {
            Some(first) => *first += &format!(", {value}"),
            None => _ = self.fields.insert(name, value.to_string()),
        }
        Ok(())
    }

    /// How the content is delimited, if there is any (RFC 9112 section 6), what the client expects,
    /// and which host it means.
    fn check_framing(&mut self) -> Result<(), Refusal> {
        ensure(self.field("transfer-encoding").is_none(), refusal::NO_LENGTH)?;
        if let Some(length) = self.field("content-length") {
            // std would take a sign.
            ensure(length.bytes().all(|byte| byte.is_ascii_digit()), refusal::LENGTH)?;
            // As other programs hold it, to whom a larger one could mean another length.
            self.content_length = length.parse::<i64>().map_err(|_| refusal::LENGTH)? as u64;
        }
        let expect = self.field("expect").unwrap_or("100-continue");
        let is_met = expect.eq_ignore_ascii_case("100-continue");
        ensure(is_met || self.minor_version == 0, refusal::EXPECT)?;
        // A second one would make it a list, with a comma.
        let is_of_host = |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+;=:[]".contains(c);
        let is_good = match self.field("host") {
            Some(host) => !host.is_empty() && host.chars().all(is_of_host),
            None => self.minor_version == 0,
        };
        ensure(is_good, refusal::HOST)
    }
}

/// A line without its CRLF; `too_long` where it goes on behind the input's limit.
fn read_line(input: &mut Take<impl BufRead>, too_long: Refusal) -> Result<Vec<u8>, Refusal> {
    let mut line = Vec::new();
    input.read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(if input.limit() == 0 { too_long } else { refusal::CUT });
    }
    ensure(line.pop() == Some(b'\r') && !line.contains(&b'\r'), refusal::LINE_END)?;
    Ok(line)
}

/// RFC 9110 section 5.6.2.
fn is_token(text: &str) -> bool {
    let is_good = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    !text.is_empty() && text.chars().all(is_good)
}

/// What a query or form says.
#[derive(Debug, Default, PartialEq)]
pub struct Form {
    pub command: Option<Vec<u8>>,
    /// By the fields in which polyfills of `EventSource` say what `Last-Event-ID` says.
    pub is_reconnect: bool,
}

/// Reads a query, or `application/x-www-form-urlencoded` content (WHATWG URL section 5.1; but
/// nothing between two `&` is refused here as an unknown field, since it shows that a command was
/// not encoded).
pub fn parse_form(form: &[u8]) -> Result<Form, Refusal> {
    let mut parsed = Form::default();
    if form.is_empty() {
        return Ok(parsed);
    }
    let with_spaces = |&byte: &u8| if byte == b'+' { b' ' } else { byte };
    let form: Vec<u8> = form.iter().map(with_spaces).collect();
    for field in form.split(|&byte| byte == b'&') {
        let mut halves = field.splitn(2, |&byte| byte == b'=');
        let (name, is_name_good) = percent_decode(halves.next().unwrap_or_default());
        let (value, is_value_good) = percent_decode(halves.next().unwrap_or_default());
        ensure(is_name_good && is_value_good, refusal::ESCAPE)?;
        match &name[..] {
            b"command" => ensure(parsed.command.replace(value).is_none(), refusal::COMMAND)?,
            b"lastEventId" | b"evs_last_event_id" => parsed.is_reconnect |= !value.is_empty(),
            _ => return Err(refusal::OTHER_FIELD.about(&shown(&name))),
        }
    }
    Ok(parsed)
}

/// Decodes percent-escapes. A malformed one stands for itself; returns also whether there was none.
pub fn percent_decode(text: &[u8]) -> (Vec<u8>, bool) {
    let (mut decoded, mut is_good, mut place) = (Vec::new(), true, 0);
    while let Some(&byte) = text.get(place) {
        let digit = |offset| char::from(*text.get(place + offset)?).to_digit(16);
        if let (b'%', Some(high), Some(low)) = (byte, digit(1), digit(2)) {
            decoded.push((high << 4 | low) as u8);
            place += 3;
        } else {
            is_good &= byte != b'%';
            decoded.push(byte);
            place += 1;
        }
    }
    (decoded, is_good)
}

#[cfg(test)]
mod tests;
