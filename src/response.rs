//! Responses as bytes.

use crate::{clock, policy::Rules, refusal::Refusal, request::Request};

pub const NO_CONTENT: &str = "204 No Content";
pub const CONTINUE: &str = "HTTP/1.1 100 Continue\r\n\r\n";

/// The text of `--help`.
pub const USAGE: &str = include_str!("usage.txt");
pub const PAGE: &[u8] = include_bytes!("console.html");
const EVENTS: &str = "Content-Type: text/event-stream\r\n";
pub const PLAIN: &str = "Content-Type: text/plain; charset=utf-8\r\n";

/// A browser keeps no page that an upgrade has made old. The page may use this very script and
/// style, to which a test holds the hashes, and talk to this server alone.
pub const PAGE_FIELDS: &str = "Content-Type: text/html; charset=utf-8\r\n\
    Cache-Control: no-store\r\nReferrer-Policy: no-referrer\r\n\
    Content-Security-Policy: default-src 'none'; img-src data:; connect-src 'self'; \
    script-src 'sha256-kYg89cifJTR3pMYIPyA7/RqHXP0IvoNiDJbassuMO5Y='; \
    style-src 'sha256-AmjkUq9OY+RRVliTJsq+yR3StDAZmCqZxMMnGphYIe0='; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n";

/// Behind the origin of a foreign page: what a preflight asks, whether it may send that; and for
/// caches, that answers differ.
const FOREIGN_FIELDS: &str = "Access-Control-Allow-Methods: GET, POST\r\n\
    Access-Control-Allow-Headers: Authorization, Content-Type, Last-Event-ID\r\nVary: Origin\r\n";

/// What an answer depends on beside its content.
pub struct Context<'a> {
    pub request: &'a Request,
    pub rules: &'a Rules,
}

impl Context<'_> {
    /// An answer with content, or for HEAD without it; `fields` say what it is.
    pub fn whole(&self, status: &str, fields: &str, content: &[u8]) -> Vec<u8> {
        let fields = format!("{fields}Content-Length: {}\r\n", content.len());
        let mut answer = self.head(status, &fields);
        if self.request.method != "HEAD" {
            answer.extend_from_slice(content);
        }
        answer
    }

    /// One line in words.
    pub fn refusal(&self, refusal: &Refusal) -> Vec<u8> {
        let field = match refusal.status {
            401 => "WWW-Authenticate: Bearer\r\n",
            405 => "Allow: GET, HEAD, OPTIONS\r\n",
            503 => "Retry-After: 1\r\n",
            _ => "",
        };
        let status = format!("{} Refused", refusal.status);
        let line = format!("{}\n", refusal.text);
        self.whole(&status, &format!("{field}{PLAIN}"), line.as_bytes())
    }

    /// The head of a command's stream.
    pub fn stream_head(&self) -> Vec<u8> {
        let is_events = self.request.wants_events();
        let mut fields = String::from(if is_events { EVENTS } else { PLAIN });
        fields += "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n";
        let trailer = if is_events { "" } else { "Trailer: Exit-Code, Exit-Signal\r\n" };
        if self.request.minor_version > 0 {
            fields += &format!("Transfer-Encoding: chunked\r\n{trailer}");
        }
        self.head("200 OK", &fields)
    }

    /// The status line and the fields, with those that every response has.
    pub fn head(&self, status: &str, fields: &str) -> Vec<u8> {
        let date = clock::imf_fixdate(clock::unix_millis());
        let connection = if self.request.ends_connection() { "close" } else { "keep-alive" };
        let mut head = format!("HTTP/1.1 {status}\r\nDate: {date}\r\nConnection: {connection}\r\n");
        if let Some(origin) = self.rules.foreign_origin(self.request) {
            head += &format!("Access-Control-Allow-Origin: {origin}\r\n{FOREIGN_FIELDS}");
        }
        head += &format!("X-Content-Type-Options: nosniff\r\n{fields}\r\n");
        head.into_bytes()
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
        let mut command =
            Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        command.stdin.take().unwrap().write_all(inside.as_bytes()).unwrap();
        let hex = command.wait_with_output().unwrap().stdout;
        let digit = |place: usize| char::from(hex[place]).to_digit(16).unwrap();
        let bits = |place: usize| {
            (0..4)
                .map(|offset| if place + offset < 64 { digit(place + offset) } else { 0 })
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
            assert!(PAGE_FIELDS.contains(&source), "the page has changed: {source}");
        }
    }
}
