//! Responses as bytes, and the one place where an answer becomes a status.

use crate::{clock, output::Stream, request::Answer, request::Head};
use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The methods of each path.
pub const PAGE_METHODS: &str = "GET, HEAD, OPTIONS";
pub const RUN_METHODS: &str = "GET, HEAD, POST, OPTIONS";

const FIELDS_TOO_LARGE: &str = "431 Request Header Fields Too Large";
const PAGE: &[u8] = include_bytes!("console.html");
const EVENTS: &str = "Content-Type: text/event-stream\r\n";
const PLAIN: &str = "Content-Type: text/plain; charset=utf-8\r\n";
const TRAILER: &str = "Trailer: Exit-Code, Exit-Signal\r\n";

/// Never an old page after an upgrade; nothing but this very script and style, and this server to talk to.
const PAGE_FIELDS: &str = "Content-Type: text/html; charset=utf-8\r\n\
    Cache-Control: no-store\r\n\
    Referrer-Policy: no-referrer\r\n\
    Content-Security-Policy: default-src 'none'; img-src data:; connect-src 'self'; \
    script-src 'sha256-wK/s8VJXRrbU3c53Tth8GUpUCn0USSPx0SvKR7q+mSM='; \
    style-src 'sha256-jdJa92PiKOozopsOEzzGW4LO2eVt81vwSMgKenZXtHc='; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n";

const PREFLIGHT_FIELDS: &str = "Access-Control-Allow-Methods: GET, POST\r\n\
    Access-Control-Allow-Headers: Authorization, Content-Type, Last-Event-ID\r\n";

/// The answer to a request, whatever it is.
pub fn render(head: &Head, answer: &Answer) -> Vec<u8> {
    let (status, why) = explain(answer);
    let field = match answer {
        Answer::Page => return whole(head, status, PAGE_FIELDS, PAGE),
        Answer::Head => return begin_stream(head).batch,
        Answer::NotStarted(code, why) if head.wants_events() => {
            let mut stream = begin_stream(head);
            stream.error(why);
            stream.exit("failed", ExitStatus::from_raw(code << 8), 0);
            return stream.ready().to_vec();
        }
        Answer::Options(methods) => {
            let preflight = when(head.origin.is_some(), PREFLIGHT_FIELDS);
            return start(head, status, &format!("Allow: {methods}\r\n{preflight}"));
        }
        Answer::Repeated => return start(head, status, ""),
        Answer::Method(methods) => format!("Allow: {methods}\r\n"),
        Answer::Token => "WWW-Authenticate: Bearer\r\n".to_string(),
        Answer::Busy(_) => "Retry-After: 1\r\n".to_string(),
        _ => String::new(),
    };
    let line = format!("{why}\n");
    whole(head, status, &(field + PLAIN), line.as_bytes())
}

/// A command's output, so far its head.
pub fn begin_stream(head: &Head) -> Stream {
    let (is_events, is_chunked) = (head.wants_events(), head.minor > 0);
    let media_type = if is_events { EVENTS } else { PLAIN };
    let stays = when(!head.close, "Connection: keep-alive\r\n");
    let chunks = when(is_chunked, "Transfer-Encoding: chunked\r\n");
    let trailer = when(is_chunked && !is_events, TRAILER);
    let fields = format!("{media_type}Cache-Control: no-cache\r\n{stays}");
    let fields = format!("{fields}X-Accel-Buffering: no\r\n{chunks}{trailer}");
    Stream::new(is_events, is_chunked, start(head, "200 OK", &fields))
}

fn whole(head: &Head, status: &str, fields: &str, content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let fields = format!("{fields}Content-Length: {length}\r\n");
    let content = if head.method == "HEAD" { b"" } else { content };
    [&start(head, status, &fields), content].concat()
}

/// The status line and the fields, with those that every response has.
fn start(head: &Head, status: &str, fields: &str) -> Vec<u8> {
    let date = clock::imf_fixdate(clock::unix_millis());
    let close = when(head.close, "Connection: close\r\n");
    let mut start = format!("HTTP/1.1 {status}\r\nDate: {date}\r\n{fields}");
    if let Some(origin) = &head.origin {
        start += &format!("Access-Control-Allow-Origin: {origin}\r\nVary: Origin\r\n");
    }
    start += &format!("X-Content-Type-Options: nosniff\r\n{close}\r\n");
    start.into_bytes()
}

fn when(is_so: bool, text: &str) -> &str {
    if is_so { text } else { "" }
}

/// Whether the connection ends with this answer: what follows cannot be understood, or there is no place even for this one.
pub fn ends_connection(answer: &Answer) -> bool {
    use Answer::*;
    let is_unclear = matches!(answer, Late | Malformed(_) | Version | Coding);
    is_unclear || matches!(answer, LineTooLong | HeadTooLarge | Busy(_))
}

/// The status, and the words for the client and the log.
pub fn explain(answer: &Answer) -> (&'static str, &str) {
    use Answer::*;
    match answer {
        Gone => ("", ""),
        Page | Head => ("200 OK", ""),
        Options(_) => ("204 No Content", ""),
        Repeated => ("204 No Content", "a reconnect runs nothing again"),
        Malformed(why) | Bad(why) => ("400 Bad Request", why),
        Token => ("401 Unauthorized", "token missing or wrong"),
        Forbidden(why) => ("403 Forbidden", why),
        NotStarted(127, why) => ("404 Not Found", why),
        NotStarted(_, why) => ("403 Forbidden", why),
        NoSuchPath => ("404 Not Found", "no such path: there are / and /run"),
        Method(_) => ("405 Method Not Allowed", "method not for this path"),
        Late => ("408 Request Timeout", "request did not arrive in time"),
        ContentTooLarge => ("413 Content Too Large", "form over 64 KiB"),
        LineTooLong => ("414 URI Too Long", "request line over 8 KiB"),
        Expectation => ("417 Expectation Failed", "Expect other than 100-continue"),
        Misdirected => ("421 Misdirected Request", "Host is not this address"),
        HeadTooLarge => (FIELDS_TOO_LARGE, "head over 16 KiB or 100 fields"),
        Coding => ("501 Not Implemented", "transfer coding not implemented"),
        UnknownMethod => ("501 Not Implemented", "method not implemented"),
        Busy(why) => ("503 Service Unavailable", why),
        Version => ("505 HTTP Version Not Supported", "HTTP version is not 1.x"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// `sha256-…` of what stands between two tags of the page, as the policy has it.
    fn hash(tag: &str) -> String {
        let page = std::str::from_utf8(PAGE).unwrap();
        let (_, rest) = page.split_once(&format!("<{tag}>")).unwrap();
        let (inside, rest) = rest.split_once(&format!("</{tag}>")).unwrap();
        assert!(!rest.contains(&format!("<{tag}")));
        let mut command = Command::new("sha256sum")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        command
            .stdin
            .take()
            .unwrap()
            .write_all(inside.as_bytes())
            .unwrap();
        let hex = command.wait_with_output().unwrap().stdout;
        let digit = |place: usize| char::from(hex[place]).to_digit(16).unwrap();
        let bits = |place: usize| {
            (0..4)
                .map(|offset| {
                    if place + offset < 64 {
                        digit(place + offset)
                    } else {
                        0
                    }
                })
                .fold(0, |all, each| all << 4 | each)
        };
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let sextet = |number: usize| {
            let (place, shift) = (number * 6 / 4, 16 - 6 - number * 6 % 4);
            char::from(alphabet[(bits(place) >> shift & 63) as usize])
        };
        (0..43).map(sextet).chain(['=']).collect()
    }

    #[test]
    fn the_policy_admits_the_page_s_own_script_and_style() {
        for tag in ["script", "style"] {
            let source = format!("{tag}-src 'sha256-{}'", hash(tag));
            assert!(
                PAGE_FIELDS.contains(&source),
                "the page has changed: {source}"
            );
        }
    }
}
