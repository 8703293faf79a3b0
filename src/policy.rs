//! Who may call, and what may run. Pure: a request and the configuration in, a verdict out.
//!
//! Any page that is open in a browser can reach a server on localhost. It cannot choose the fields that the browser adds, which the
//! rules look at, and it cannot know a token.

use crate::request::{Refusal, Request, form_value};
use crate::words;
use std::net::IpAddr;

/// What the options say about callers and commands.
#[derive(Default)]
pub struct Policy {
    pub token: Option<String>,
    /// Foreign origins, as browsers serialise them; `*` is any.
    pub origins: Vec<String>,
    /// Nothing here allows everything.
    pub allowed: Vec<Pattern>,
}

/// A command line that may run, word for word.
#[derive(Debug, PartialEq)]
pub struct Pattern {
    words: Vec<Vec<u8>>,
    /// It ended in `*`: further words may follow.
    open: bool,
}

impl Pattern {
    pub fn new(line: &[u8]) -> Result<Pattern, &'static str> {
        let mut words = words::split(line)?;
        let open = words.last().is_some_and(|last| last == b"*");
        if open {
            words.pop();
        }
        if words.is_empty() && !open {
            return Err("command is empty");
        }
        Ok(Pattern { words, open })
    }

    fn admits(&self, words: &[Vec<u8>]) -> bool {
        if self.open {
            words.starts_with(&self.words)
        } else {
            words == self.words
        }
    }
}

impl Policy {
    /// The `Host` field, and rule 1: a name that can only mean this server. It stops DNS rebinding, where another site's name is made to
    /// resolve to this host's address. `local` is the address that the connection came in on; none for a Unix socket.
    pub fn host(&self, request: &Request, local: Option<IpAddr>) -> Result<(), Refusal> {
        let hosts: Vec<&[u8]> = request.all("host").collect();
        match hosts.len() {
            1 => {}
            0 if request.minor == 0 => {}
            _ => return Err(Refusal::Host("HTTP/1.1 needs exactly one Host")),
        }
        let authorities = request.authority.iter().map(String::as_bytes).chain(hosts);
        for authority in authorities {
            let Some(name) = host_name(authority) else {
                return Err(Refusal::Host("malformed Host"));
            };
            if self.token.is_none() && !means_here(&name, local) {
                return Err(Refusal::Misdirected(
                    "Host is not this server's address; another name needs a token",
                ));
            }
        }
        Ok(())
    }

    /// Rules 2 to 4, which tell another site's page from everybody else.
    pub fn browser(&self, request: &Request) -> Result<(), Refusal> {
        let mut origins = request.all("origin");
        if let Some(origin) = origins.next() {
            let allowed = is_own(request, origin) || self.is_allowed_origin(origin);
            return match origins.next() {
                None if allowed => Ok(()),
                _ => Err(Refusal::Forbidden("origin not allowed")),
            };
        }
        let site = request.all("sec-fetch-site").collect::<Vec<_>>();
        if !site
            .iter()
            .all(|site| matches!(*site, b"same-origin" | b"none"))
        {
            return Err(Refusal::Forbidden(
                "request of another site's page (Sec-Fetch-Site)",
            ));
        }
        if request.path == "/run"
            && request
                .all("sec-fetch-mode")
                .any(|mode| mode == b"navigate")
        {
            return Err(Refusal::Forbidden("a link runs nothing (Sec-Fetch-Mode)"));
        }
        let browser = request
            .field("user-agent")
            .is_some_and(|agent| agent.starts_with(b"Mozilla/"));
        if self.token.is_none() && site.is_empty() && browser {
            return Err(Refusal::Forbidden(
                "a browser that says neither Origin nor Sec-Fetch-Site",
            ));
        }
        Ok(())
    }

    /// The foreign origin whose pages may read the answer.
    pub fn foreign_origin<'a>(&self, request: &'a Request) -> Option<&'a [u8]> {
        let mut origins = request.all("origin");
        let origin = origins.next()?;
        (origins.next().is_none() && !is_own(request, origin) && self.is_allowed_origin(origin))
            .then_some(origin)
    }

    /// The bearer token (RFC 6750 section 2.1), compared in a time that does not tell how much of it was right.
    pub fn token(&self, request: &Request) -> Result<(), Refusal> {
        let Some(token) = &self.token else {
            return Ok(());
        };
        let mut fields = request.all("authorization");
        let (Some(value), None) = (fields.next(), fields.next()) else {
            return Err(Refusal::Token);
        };
        let (scheme, given) = value.split_at(value.len().min(7));
        let given = given.trim_ascii_start();
        let differences = token
            .bytes()
            .zip(given)
            .fold(0, |all, (a, b)| all | (a ^ b));
        // The length of a token is no secret.
        let same = std::hint::black_box(differences) == 0 && token.len() == given.len();
        if same && scheme.eq_ignore_ascii_case(b"bearer ") {
            Ok(())
        } else {
            Err(Refusal::Token)
        }
    }

    /// The words of the one `command` in a query or form, if they may run.
    pub fn command(&self, form: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
        let line = form_value(form, "command")?.ok_or(Refusal::Command("no command"))?;
        let words = words::split(&line).map_err(Refusal::Command)?;
        if words.is_empty() {
            return Err(Refusal::Command("command is empty"));
        }
        if self.allowed.is_empty() || self.allowed.iter().any(|pattern| pattern.admits(&words)) {
            Ok(words)
        } else {
            Err(Refusal::Forbidden("command not allowed"))
        }
    }

    fn is_allowed_origin(&self, origin: &[u8]) -> bool {
        origin != b"null"
            && self
                .origins
                .iter()
                .any(|allowed| allowed == "*" || allowed.as_bytes() == origin)
    }
}

/// Whether `origin` is `http://` and what the request says this server is called.
fn is_own(request: &Request, origin: &[u8]) -> bool {
    let host = request
        .authority
        .as_ref()
        .map(String::as_bytes)
        .or(request.field("host"));
    host.is_some() && origin.strip_prefix(b"http://") == host
}

/// The host of `host[:port]`, lower case; `None` where the grammar of RFC 3986 section 3.2.2 does not have it.
fn host_name(authority: &[u8]) -> Option<String> {
    let authority = std::str::from_utf8(authority).ok()?;
    let end = if authority.starts_with('[') {
        authority.find(']')? + 1
    } else {
        authority.find(':').unwrap_or(authority.len())
    };
    let (host, port) = authority.split_at(end);
    let port_is_good = port.is_empty()
        || port
            .strip_prefix(':')
            .is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()));
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=[]:".contains(&byte);
    (!host.is_empty() && port_is_good && host.bytes().all(good)).then(|| host.to_ascii_lowercase())
}

/// Parsed addresses and whole names are compared, never beginnings or ends: `127.0.0.1.evil.test` is somebody else's.
fn means_here(name: &str, local: Option<IpAddr>) -> bool {
    let literal = match name
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        Some(literal) => literal.parse().ok().map(IpAddr::V6),
        None => name.parse().ok().map(IpAddr::V4),
    };
    if let Some(address) = literal {
        return local == Some(address);
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    local.is_none_or(|local| local.is_loopback())
        && (name == "localhost" || name.ends_with(".localhost"))
}
