//! Who may call, and what may run. Pure: a request and the configuration in, a verdict out.
//!
//! Any page that is open in a browser can reach a server on localhost. It cannot choose the fields that the browser adds, which the
//! rules look at, and it cannot know a token.

use crate::request::{Answer, Head, Result, ensure, form_value};
use crate::words;
use Answer::{Bad, Forbidden};
use std::{hint::black_box, net::IpAddr};

const FOREIGN_PAGE: Answer = Forbidden("another site's page calls (Sec-Fetch-Site)");
const LINK: Answer = Forbidden("a link runs nothing (Sec-Fetch-Mode)");
const UNKNOWN_PAGE: Answer = Forbidden("a browser without Origin and Sec-Fetch-Site");

/// What the options say about callers and commands.
#[derive(Default)]
pub struct Policy {
    pub token: Option<String>,
    /// Foreign origins, as browsers serialise them; `*` is any.
    pub origins: Vec<String>,
    /// Command lines that may run, word for word; a last word `*` is any further words. None at all allows everything.
    pub allowed: Vec<Vec<Vec<u8>>>,
}

/// A command line and its words.
pub struct Order {
    pub line: Vec<u8>,
    pub words: Vec<Vec<u8>>,
}

impl Policy {
    /// `Host`, and rule 1: a name that can only mean this server. It stops DNS rebinding, where another site's name is made to resolve
    /// to this host's address. `local` is the address that the connection came in on; none for a Unix socket.
    pub fn host(&self, head: &Head, local: Option<IpAddr>) -> Result {
        let hosts = head.all("host");
        let is_one = hosts.len() == 1 || (hosts.is_empty() && head.minor == 0);
        ensure(is_one, Bad("HTTP/1.1 needs exactly one Host"))?;
        for authority in hosts.into_iter().chain(head.authority.as_deref()) {
            let name = host_name(authority).ok_or(Bad("malformed Host"))?;
            let is_trusted = self.token.is_some() || means_here(&name, local);
            ensure(is_trusted, Answer::Misdirected)?;
        }
        Ok(())
    }

    /// Rules 2 to 4, which tell another site's page from everybody else.
    pub fn browser(&self, head: &Head) -> Result {
        self.foreign_origin(head)?;
        if !head.all("origin").is_empty() {
            return Ok(());
        }
        let sites = head.all("sec-fetch-site");
        let is_own = |site: &&str| ["same-origin", "none"].contains(site);
        ensure(sites.iter().all(is_own), FOREIGN_PAGE)?;
        let navigates = head.all("sec-fetch-mode").contains(&"navigate");
        ensure(head.path != "/run" || !navigates, LINK)?;
        let agents = head.all("user-agent");
        let is_browser = agents.iter().any(|agent| agent.starts_with("Mozilla/"));
        let is_known = !is_browser || !sites.is_empty() || self.token.is_some();
        ensure(is_known, UNKNOWN_PAGE)
    }

    /// Rule 2: the one foreign origin whose page may call and read the answer; none for the own page, and for who is no page.
    pub fn foreign_origin(&self, head: &Head) -> Result<Option<String>> {
        let hosts = head.all("host");
        let host = head.authority.as_deref().or(hosts.first().copied());
        let is_listed = |origin: &str| self.origins.iter().any(|it| it == origin || it == "*");
        let is_allowed = |it: &str| it != "null" && it.is_ascii() && is_listed(it);
        match head.all("origin")[..] {
            [] => Ok(None),
            [origin] if host.is_some() && origin.strip_prefix("http://") == host => Ok(None),
            [origin] if is_allowed(origin) => Ok(Some(origin.to_string())),
            _ => Err(Forbidden("origin not allowed")),
        }
    }

    /// The bearer token (RFC 6750 section 2.1), compared in a time that does not tell how much of it was right.
    pub fn token(&self, head: &Head) -> Result {
        let fields = head.all("authorization");
        let credentials = fields.first().and_then(|it| it.split_once(' '));
        let (scheme, given) = credentials.unwrap_or_default();
        let given = given.trim_start_matches(' ');
        let is_right = self.token.as_ref().is_none_or(|token| {
            let pairs = token.bytes().zip(given.bytes());
            let differences = pairs.fold(0, |all, (a, b)| black_box(all | (a ^ b)));
            // The length of a token is no secret.
            let is_same = differences == 0 && token.len() == given.len();
            is_same && fields.len() == 1 && scheme.eq_ignore_ascii_case("bearer")
        });
        ensure(is_right, Answer::Token)
    }

    /// The one `command` in a query or form, if it may run.
    pub fn command(&self, form: &[u8]) -> Result<Order> {
        let line = form_value(form, b"command")?.ok_or(Bad("no command"))?;
        let words = words::split(&line).map_err(Bad)?;
        ensure(!words.is_empty(), Bad("command is empty"))?;
        let admits = |pattern: &Vec<Vec<u8>>| match pattern.split_last() {
            Some((last, first)) if last == b"*" => words.starts_with(first),
            _ => words == *pattern,
        };
        let is_allowed = self.allowed.is_empty() || self.allowed.iter().any(admits);
        ensure(is_allowed, Forbidden("command not allowed"))?;
        Ok(Order { line, words })
    }
}

/// The host of `host[:port]`, lower case; none where RFC 3986 section 3.2.2 does not have it.
fn host_name(authority: &str) -> Option<String> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (authority, ""),
    };
    let literal = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    let in_name = |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=".contains(c);
    let is_good = |c: char| in_name(c) || (literal.is_some() && c == ':');
    let is_host = !host.is_empty() && literal.unwrap_or(host).chars().all(is_good);
    let is_port = port.chars().all(|c| c.is_ascii_digit());
    (is_host && is_port).then(|| host.to_ascii_lowercase())
}

/// Whole names and parsed addresses are compared, never beginnings or ends: `127.0.0.1.evil.test` is somebody else's.
fn means_here(name: &str, local: Option<IpAddr>) -> bool {
    let literal = name.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    if let Ok(address) = literal.unwrap_or(name).parse() {
        return local == Some(address);
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_loopback = local.is_none_or(|local| local.is_loopback());
    is_loopback && (name == "localhost" || name.ends_with(".localhost"))
}
