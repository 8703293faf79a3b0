//! Responses as bytes, and the one place where a refusal becomes a status.

use crate::clock;
use crate::request::Refusal;
use std::fmt::Display;

/// What the answers to one request have in common.
#[derive(Default)]
pub struct Answer<'a> {
    /// The connection ends with this answer.
    pub close: bool,
    /// It answers HEAD: no content follows.
    pub head_only: bool,
    /// The allowed origin of another site's page, which may then read the answer.
    pub foreign_origin: Option<&'a [u8]>,
}

/// How a command's output is sent: as an event stream or as plain text, in chunks or up to the end of the connection.
#[derive(Clone, Copy)]
pub struct Format {
    pub events: bool,
    pub chunked: bool,
}

pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The methods of each path.
pub const PAGE_METHODS: &str = "GET, HEAD, OPTIONS";
pub const RUN_METHODS: &str = "GET, HEAD, POST, OPTIONS";

const PAGE: &[u8] = include_bytes!("console.html");

/// Nothing but what stands in the page itself, and this server to talk to.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

impl Answer<'_> {
    /// The console page.
    pub fn page(&self) -> Vec<u8> {
        let mut head = self.head("200 OK");
        field(&mut head, "Content-Type", "text/html; charset=utf-8");
        field(&mut head, "Cache-Control", "no-store");
        field(&mut head, "Content-Security-Policy", PAGE_POLICY);
        field(&mut head, "Referrer-Policy", "no-referrer");
        self.content(head, PAGE)
    }

    /// The answer to OPTIONS, which is a CORS preflight where another site's page asks.
    pub fn options(&self, methods: &str) -> Vec<u8> {
        let mut head = self.head("204 No Content");
        field(&mut head, "Allow", methods);
        if self.foreign_origin.is_some() {
            field(&mut head, "Access-Control-Allow-Methods", "GET, POST");
            field(
                &mut head,
                "Access-Control-Allow-Headers",
                "Authorization, Content-Type, Last-Event-ID",
            );
        }
        end(head)
    }

    /// The head of a command's output; what follows is framed as `format` says.
    pub fn stream(&self, format: Format) -> Vec<u8> {
        let mut head = self.head("200 OK");
        field(
            &mut head,
            "Content-Type",
            if format.events {
                "text/event-stream"
            } else {
                "text/plain; charset=utf-8"
            },
        );
        field(&mut head, "Cache-Control", "no-cache");
        if !self.close {
            field(&mut head, "Connection", "keep-alive");
        }
        field(&mut head, "X-Accel-Buffering", "no");
        if format.chunked {
            field(&mut head, "Transfer-Encoding", "chunked");
            if !format.events {
                field(&mut head, "Trailer", "Exit-Code, Exit-Signal");
            }
        }
        end(head)
    }

    /// One line of plain text that says what is wrong.
    pub fn refusal(&self, refusal: &Refusal) -> Vec<u8> {
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
            field(
                &mut head,
                "Access-Control-Allow-Origin",
                origin.escape_ascii(),
            );
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
        Malformed(why) | Host(why) | Command(why) => ("400 Bad Request", *why),
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
        Misdirected(why) => ("421 Misdirected Request", *why),
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
