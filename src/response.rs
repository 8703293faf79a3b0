//! Responses as bytes, and the one place where a refusal becomes a status.

use crate::clock;
use crate::output::{Format, Stream};
use crate::request::Refusal;
use std::fmt::Display;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// An answer that is no command's output.
pub enum Reply {
    Page,
    /// Which methods there are; a CORS preflight where another site's page asks.
    Options(&'static str),
    /// The head of what GET would get.
    Head(Format),
    /// An event stream that says why a command could not be started, with the exit status by which a shell does (XCU 2.8.2).
    Failed(Format, i32, String),
    Refusal(Refusal),
}

/// How the answers to one request are given.
pub struct Answer<'a> {
    /// The connection ends with this answer.
    pub close: bool,
    /// It answers HEAD: no content follows.
    pub head_only: bool,
    /// The allowed origin of another site's page, which may then read the answer.
    pub foreign_origin: Option<&'a str>,
}

pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The methods of each path.
pub const PAGE_METHODS: &str = "GET, HEAD, OPTIONS";
pub const RUN_METHODS: &str = "GET, HEAD, POST, OPTIONS";

const PAGE: &[u8] = include_bytes!("console.html");

/// Nothing but what stands in the page itself, and this server to talk to.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Reply {
        Reply::Refusal(refusal)
    }
}

impl Reply {
    /// Whether the rest of the connection cannot be understood any more.
    pub fn breaks_framing(&self) -> bool {
        matches!(self, Reply::Refusal(refusal) if refusal.breaks_framing())
    }
}

impl Answer<'_> {
    pub fn render(&self, reply: &Reply) -> Vec<u8> {
        match reply {
            Reply::Page => self.page(),
            Reply::Options(methods) => self.options(methods),
            Reply::Head(format) => self.stream(*format),
            Reply::Failed(format, code, why) => {
                let mut stream = Stream::new(*format, self.stream(*format));
                stream.error(why);
                stream.exit("failed", ExitStatus::from_raw(code << 8), 0, [0, 0]);
                stream.take()
            }
            Reply::Refusal(refusal) => self.refusal(refusal),
        }
    }

    /// The head of a command's output.
    pub fn stream(&self, format: Format) -> Vec<u8> {
        let media_type = if format.events {
            "text/event-stream"
        } else {
            "text/plain; charset=utf-8"
        };
        let mut head = self.head("200 OK");
        field(&mut head, "Content-Type", media_type);
        field(&mut head, "Cache-Control", "no-cache");
        if !self.close {
            field(&mut head, "Connection", "keep-alive");
        }
        field(&mut head, "X-Accel-Buffering", "no");
        if format.chunked {
            field(&mut head, "Transfer-Encoding", "chunked");
        }
        if format.chunked && !format.events {
            field(&mut head, "Trailer", "Exit-Code, Exit-Signal");
        }
        end(head)
    }

    fn page(&self) -> Vec<u8> {
        let mut head = self.head("200 OK");
        field(&mut head, "Content-Type", "text/html; charset=utf-8");
        field(&mut head, "Cache-Control", "no-store");
        field(&mut head, "Content-Security-Policy", PAGE_POLICY);
        field(&mut head, "Referrer-Policy", "no-referrer");
        self.content(head, PAGE)
    }

    fn options(&self, methods: &str) -> Vec<u8> {
        let mut head = self.head("204 No Content");
        field(&mut head, "Allow", methods);
        if self.foreign_origin.is_some() {
            let fields = "Authorization, Content-Type, Last-Event-ID";
            field(&mut head, "Access-Control-Allow-Methods", "GET, POST");
            field(&mut head, "Access-Control-Allow-Headers", fields);
        }
        end(head)
    }

    /// One line of plain text that says what is wrong.
    fn refusal(&self, refusal: &Refusal) -> Vec<u8> {
        let (status, why) = explain(refusal);
        let mut head = self.head(status);
        match refusal {
            Refusal::Repeated => return end(head),
            Refusal::Method(methods) => field(&mut head, "Allow", methods),
            Refusal::Token => field(&mut head, "WWW-Authenticate", "Bearer"),
            Refusal::Busy(_) => field(&mut head, "Retry-After", 1),
            _ => {}
        }
        field(&mut head, "Content-Type", "text/plain; charset=utf-8");
        self.content(head, format!("{why}\n").as_bytes())
    }

    fn head(&self, status: &str) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {status}\r\n").into_bytes();
        field(&mut head, "Date", clock::imf_fixdate(clock::unix_millis()));
        field(&mut head, "X-Content-Type-Options", "nosniff");
        if let Some(origin) = self.foreign_origin {
            field(&mut head, "Access-Control-Allow-Origin", origin);
            field(&mut head, "Vary", "Origin");
        }
        if self.close {
            field(&mut head, "Connection", "close");
        }
        head
    }

    fn content(&self, mut head: Vec<u8>, content: &[u8]) -> Vec<u8> {
        field(&mut head, "Content-Length", content.len());
        let mut whole = end(head);
        if !self.head_only {
            whole.extend_from_slice(content);
        }
        whole
    }
}

/// The status line's code and reason, and the words for the client and the log.
pub fn explain(refusal: &Refusal) -> (&'static str, String) {
    use Refusal::*;
    let (status, why) = match refusal {
        Gone => ("400 Bad Request", "connection lost"),
        Malformed(why) | Bad(why) => ("400 Bad Request", *why),
        Token => (
            "401 Unauthorized",
            "token missing or wrong: send Authorization: Bearer TOKEN",
        ),
        Forbidden(why) => ("403 Forbidden", *why),
        CannotRun(why) => ("403 Forbidden", why.as_str()),
        NoSuchPath => ("404 Not Found", "no such path: there are / and /run"),
        NoProgram(why) => ("404 Not Found", why.as_str()),
        Method(_) => ("405 Method Not Allowed", "method not for this path"),
        Late => ("408 Request Timeout", "request did not arrive in time"),
        FormTooLarge => ("413 Content Too Large", "form over 64 KiB"),
        LineTooLong => (
            "414 URI Too Long",
            "request line over 8 KiB: send a long command as a form",
        ),
        Expectation => ("417 Expectation Failed", "Expect other than 100-continue"),
        Misdirected => (
            "421 Misdirected Request",
            "Host is not this server's address: another name needs a token",
        ),
        HeadTooLarge => (
            "431 Request Header Fields Too Large",
            "head over 16 KiB or 100 fields",
        ),
        Coding => ("501 Not Implemented", "transfer coding other than chunked"),
        UnknownMethod => ("501 Not Implemented", "method not implemented"),
        Busy(why) => ("503 Service Unavailable", *why),
        Version => ("505 HTTP Version Not Supported", "HTTP version is not 1.x"),
        Repeated => (
            "204 No Content",
            "a reconnect runs nothing again (Last-Event-ID)",
        ),
    };
    (status, why.to_string())
}

fn field(head: &mut Vec<u8>, name: &str, value: impl Display) {
    head.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
}

fn end(mut head: Vec<u8>) -> Vec<u8> {
    head.extend_from_slice(b"\r\n");
    head
}
