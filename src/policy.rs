//! Who may call, and what may run. Pure: a request and the configuration in, a verdict out.
//!
//! Any page that is open in a browser can reach a server on localhost. It cannot choose the fields that the browser adds, which the
//! rules look at, and it cannot know a token.

use crate::request::{Answer, Head, Result, form_value};
use crate::words;
use Answer::{Bad, Forbidden};
use std::net::IpAddr;

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
    pub fn host(&self, head: &Head, local: Option<IpAddr>) -> Result<()> {
        let hosts = head.all("host");
        if hosts.len() > 1 || (hosts.is_empty() && head.minor > 0) {
            return Err(Bad("HTTP/1.1 needs exactly one Host"));
        }
        for authority in hosts.into_iter().chain(head.authority.as_deref()) {
            let name = host_name(authority).ok_or(Bad("malformed Host"))?;
            if self.token.is_none() && !means_here(&name, local) {
                return Err(Answer::Misdirected);
            }
        }
        Ok(())
    }

    /// Rules 2 to 4, which tell another site's page from everybody else.
    pub fn browser(&self, head: &Head) -> Result<()> {
        let origins = head.all("origin");
        if !origins.is_empty() {
            let good = is_own(head, origins[0]) || self.admits_origin(origins[0]);
            let refusal = Err(Forbidden("origin not allowed"));
            return if good && origins.len() == 1 {
                Ok(())
            } else {
                refusal
            };
        }
        let sites = head.all("sec-fetch-site");
        if sites
            .iter()
            .any(|&site| site != "same-origin" && site != "none")
        {
            return Err(Forbidden("another site's page calls (Sec-Fetch-Site)"));
        }
        if head.path == "/run" && head.all("sec-fetch-mode").contains(&"navigate") {
            return Err(Forbidden("a link runs nothing (Sec-Fetch-Mode)"));
        }
        let browser = |agent: &&str| agent.starts_with("Mozilla/");
        let silent = self.token.is_none() && sites.is_empty();
        if silent && head.all("user-agent").iter().any(browser) {
            return Err(Forbidden("a browser without Origin and Sec-Fetch-Site"));
        }
        Ok(())
    }

    /// The one foreign origin, if its pages may read the answer.
    pub fn foreign_origin<'a>(&self, head: &'a Head) -> Option<&'a str> {
        let [origin] = head.all("origin")[..] else {
            return None;
        };
        (!is_own(head, origin) && self.admits_origin(origin)).then_some(origin)
    }

    /// The bearer token (RFC 6750 section 2.1), compared in a time that does not tell how much of it was right.
    pub fn token(&self, head: &Head) -> Result<()> {
        let Some(token) = &self.token else {
            return Ok(());
        };
        let [credentials] = head.all("authorization")[..] else {
            return Err(Answer::Token);
        };
        let (scheme, given) = credentials.split_once(' ').unwrap_or_default();
        let given = given.trim_start();
        let pairs = token.bytes().zip(given.bytes());
        let differences = pairs.fold(0, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
        // The length of a token is no secret.
        let right = differences == 0 && token.len() == given.len();
        let bearer = scheme.eq_ignore_ascii_case("bearer");
        if right && bearer {
            Ok(())
        } else {
            Err(Answer::Token)
        }
    }

    /// The one `command` in a query or form, if it may run.
    pub fn command(&self, form: &[u8]) -> Result<Order> {
        let line = form_value(form, b"command")?.ok_or(Bad("no command"))?;
        let words = words::split(&line).map_err(Bad)?;
        if words.is_empty() {
            return Err(Bad("command is empty"));
        }
        let admits = |pattern: &Vec<Vec<u8>>| match pattern.split_last() {
            Some((last, first)) if last == b"*" => words.starts_with(first),
            _ => words == *pattern,
        };
        if !self.allowed.is_empty() && !self.allowed.iter().any(admits) {
            return Err(Forbidden("command not allowed"));
        }
        Ok(Order { line, words })
    }

    fn admits_origin(&self, origin: &str) -> bool {
        let admits = |allowed: &String| allowed == origin || allowed == "*";
        origin != "null" && origin.is_ascii() && self.origins.iter().any(admits)
    }
}

/// Whether `origin` is `http://` and what the head says this server is called.
fn is_own(head: &Head, origin: &str) -> bool {
    let hosts = head.all("host");
    let name = head.authority.as_deref().or(hosts.first().copied());
    name.is_some() && origin.strip_prefix("http://") == name
}

/// The host of `host[:port]`, lower case; none where RFC 3986 section 3.2.2 does not have it.
fn host_name(authority: &str) -> Option<String> {
    let bracket = authority.rfind(']').unwrap_or(0);
    let colon = authority[bracket..].find(':').map(|at| bracket + at);
    let (host, port) = authority.split_at(colon.unwrap_or(authority.len()));
    let in_host = |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=[]:".contains(c);
    let good = !host.is_empty()
        && host.chars().all(in_host)
        && host.starts_with('[') == host.ends_with(']');
    (good && port.chars().skip(1).all(|c| c.is_ascii_digit())).then(|| host.to_ascii_lowercase())
}

/// Whole names and parsed addresses are compared, never beginnings or ends: `127.0.0.1.evil.test` is somebody else's.
fn means_here(name: &str, local: Option<IpAddr>) -> bool {
    let v6 = |name: &str| {
        name.strip_prefix('[')?
            .strip_suffix(']')?
            .parse()
            .ok()
            .map(IpAddr::V6)
    };
    if let Some(address) = v6(name).or(name.parse().ok().map(IpAddr::V4)) {
        return local == Some(address);
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    let here = local.is_none_or(|local| local.is_loopback());
    here && (name == "localhost" || name.ends_with(".localhost"))
}
