//! Who may call, and what may run. Pure: a request and the rules in, a refusal out, or none.
//!
//! Any page that is open in a browser can reach a server on localhost. It cannot choose the fields
//! that the browser adds, which the rules look at, and it cannot know a token.

use crate::refusal::{self, Refusal, ensure, shown};
use crate::{request::Request, words};
use std::{hint::black_box, net::IpAddr, net::SocketAddr};

/// What the options say about callers and commands.
#[derive(Default)]
pub struct Rules {
    pub token: Option<String>,
    /// Foreign origins, as browsers serialise them; `*` is any.
    pub origins: Vec<String>,
    /// What may run; nothing at all here allows everything.
    pub allowed: Vec<Allowed>,
}

/// An `--allow`.
pub struct Allowed {
    text: String,
    words: Vec<Vec<u8>>,
    /// Any further arguments may follow the words.
    is_open: bool,
}

impl Rules {
    /// Checks who calls, and for what, in the order in which refusals take precedence. `local` is
    /// the address that the connection came in on.
    pub fn check_caller(&self, request: &Request, local: IpAddr) -> Result<(), Refusal> {
        let (path, _) = request.path_and_query();
        let method = request.method.as_str();
        if let (Some(host), None) = (request.field("host"), &self.token) {
            ensure(means_here(host, local), refusal::MISDIRECTED.about(&local.to_string()))?;
        }
        // Any site may link to the page, which by itself runs nothing.
        if path != "/" || !matches!(method, "GET" | "HEAD") {
            self.check_browser(request, path)?;
        }
        ensure(matches!(path, "/" | "/run" | "/commands"), refusal::NO_PATH)?;
        match method {
            // A preflight never bears a token.
            "OPTIONS" => return Ok(()),
            "GET" | "HEAD" => {}
            "POST" => ensure(path == "/run", refusal::NOT_HERE)?,
            _ => return Err(refusal::NO_METHOD),
        }
        if path == "/" { Ok(()) } else { self.check_token(request) }
    }

    /// The words of a command line, if it may run.
    pub fn admit(&self, command: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
        let words = words::split(command)?;
        let is_admitted = self.allowed.iter().any(|allowed| allowed.admits(&words));
        ensure(is_admitted || self.allowed.is_empty(), refusal::NOT_ALLOWED)?;
        Ok(words)
    }

    /// What may run, a line each, as the options have it; nothing where everything may.
    pub fn listed(&self) -> String {
        self.allowed.iter().map(|allowed| format!("{}\n", allowed.text)).collect()
    }

    /// The foreign origin whose page may read the answer, if the request comes from one.
    pub fn foreign_origin<'r>(&self, request: &'r Request) -> Option<&'r str> {
        let origin = request.field("origin")?;
        // The opaque origin `null` could be anybody's.
        let is_origin = origin.contains("://") && !origin.contains(' ');
        let is_listed = self.origins.iter().any(|listed| listed == origin || listed == "*");
        if is_origin && is_listed && !is_own(origin, request) { Some(origin) } else { None }
    }

    /// Tells another site's page from everybody else.
    fn check_browser(&self, request: &Request, path: &str) -> Result<(), Refusal> {
        if let Some(origin) = request.field("origin") {
            let is_good = is_own(origin, request) || self.foreign_origin(request).is_some();
            return ensure(is_good, refusal::ORIGIN.about(&shown(origin.as_bytes())));
        }
        let is_guarded = matches!(path, "/run" | "/commands");
        let navigates = request.field("sec-fetch-mode") == Some("navigate");
        ensure(!is_guarded || !navigates, refusal::LINK)?;
        if let Some(site) = request.field("sec-fetch-site") {
            return ensure(matches!(site, "same-origin" | "none"), refusal::OTHER_SITE);
        }
        let agent = request.field("user-agent").unwrap_or_default();
        let is_known = !agent.starts_with("Mozilla/") || self.token.is_some();
        ensure(!is_guarded || is_known, refusal::BROWSER)
    }

    /// The bearer token (RFC 6750 section 2.1).
    fn check_token(&self, request: &Request) -> Result<(), Refusal> {
        let Some(token) = &self.token else { return Ok(()) };
        let credentials = request.field("authorization").unwrap_or_default();
        let (scheme, given) = credentials.split_once(' ').unwrap_or_default();
        let is_same = equals_in_constant_time(token, given.trim_start_matches(' '));
        ensure(is_same && scheme.eq_ignore_ascii_case("bearer"), refusal::TOKEN)
    }
}

impl Allowed {
    /// Reads the text of an `--allow`: a command line, and where the text ends in a blank and a
    /// bare `*`, one with any further arguments. A star that is quoted is one, as is one that is
    /// all there is.
    pub fn parse(text: &str) -> Result<Allowed, Refusal> {
        let mut words = words::split(text.as_bytes())?;
        // Both are asked: `ls "*"` has the last word, but ends in a quote; `ls a\ *` has the end,
        // but the last word `a *`.
        let is_last_word = words.len() > 1 && words.last().is_some_and(|word| word == b"*");
        let is_open = is_last_word && (text.ends_with(" *") || text.ends_with("\t*"));
        if is_open {
            words.pop();
        }
        Ok(Allowed { text: text.to_string(), words, is_open })
    }

    fn admits(&self, words: &[Vec<u8>]) -> bool {
        words == self.words || (self.is_open && words.starts_with(&self.words))
    }
}

/// Whether the origin is this server's own, by the name that the request has for it.
fn is_own(origin: &str, request: &Request) -> bool {
    origin.strip_prefix("http://").is_some_and(|host| request.field("host") == Some(host))
}

/// In a time that does not tell how much of it was right. The length of a token is no secret.
fn equals_in_constant_time(token: &str, given: &str) -> bool {
    let pairs = token.bytes().zip(given.bytes());
    // Behind the black box the compiler cannot see that the loop could end early.
    let differences = pairs.fold(0, |all, (ours, theirs)| black_box(all | (ours ^ theirs)));
    differences == 0 && token.len() == given.len()
}

/// Whether a `Host` can only mean this server. It stops DNS rebinding, where another site's name is
/// made to resolve to this host's address. Whole names and parsed addresses are compared, never
/// beginnings: `127.0.0.1.evil.test` is somebody else's. All below `.localhost` is this host (RFC
/// 6761 section 6.3).
fn means_here(host: &str, local: IpAddr) -> bool {
    // std reads an address of either kind with a port. The port says nothing: a tunnel has another
    // one.
    if let Ok(address) = host.parse().or(format!("{host}:80").parse::<SocketAddr>()) {
        return address.ip().to_canonical() == local;
    }
    let (name, _port) = host.split_once(':').unwrap_or((host, ""));
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    local.is_loopback() && (name == "localhost" || name.ends_with(".localhost"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(pattern: &str, line: &str) -> bool {
        let allowed = Allowed::parse(pattern).unwrap();
        allowed.admits(&words::split(line.as_bytes()).unwrap())
    }

    #[test]
    fn only_a_bare_star_behind_a_blank_is_the_wildcard() {
        let table = [
            ("df *", "df", true),
            ("df *", "df -h /", true),
            ("df *", "dfx", false),
            ("df\t*", "df x", true),
            ("df  *", "df x", true),
            ("ls -d '*'", "ls -d '*'", true),
            ("ls -d '*'", "ls -d x", false),
            ("ls -d \\*", "ls -d x", false),
            ("ls\\ *", "ls x", false),
            ("ls\\ *", "'ls *'", true),
            ("'ls' *", "ls x", true),
            ("ls '-a *'", "ls -b", false),
            ("ls*", "lsx", false),
            ("*", "true", false),
            ("*", "*", true),
            (" *", "true", false),
            ("echo 'a  b'", "echo \"a  b\"", true),
            ("echo 'a  b'", "echo a b", false),
            ("echo", "echo x", false),
        ];
        for (pattern, line, expected) in table {
            assert_eq!(admits(pattern, line), expected, "{pattern} {line}");
        }
    }

    #[test]
    fn a_host_is_here_or_elsewhere() {
        let table = [
            ("127.0.0.1", true),
            ("127.0.0.1:1", true),
            ("[::ffff:127.0.0.1]", true),
            ("[::ffff:7f00:1]:1", true),
            ("localhost", true),
            ("LocalHost.:1", true),
            ("a.localhost:", true),
            ("", false),
            (":80", false),
            ("::1", false),
            ("[::1]", false),
            ("[::1", false),
            ("[127.0.0.1]", false),
            ("127.0.0.1:x", false),
            ("127.0.0.1.", false),
            ("127.1", false),
            ("0.0.0.0", false),
            ("a.b", false),
            ("[localhost]", false),
            ("localhost..", false),
            ("alocalhost", false),
            ("localhost.a", false),
            ("127.0.0.1.a", false),
        ];
        for (host, expected) in table {
            assert_eq!(means_here(host, [127, 0, 0, 1].into()), expected, "{host}");
        }
        assert!(means_here("[::1]:1", IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])));
        assert!(!means_here("localhost", [192, 0, 2, 1].into()));
    }

    #[test]
    fn tokens_are_equal_or_not() {
        for (given, expected) in
            [("abc", true), ("abd", false), ("ab", false), ("abcd", false), ("", false)]
        {
            assert_eq!(equals_in_constant_time("abc", given), expected, "{given}");
        }
    }
}
