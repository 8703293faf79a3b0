//! Who may call, and what may run. Pure: a request and the rules in, a verdict out.
//!
//! Any page that is open in a browser can reach a server on localhost. It cannot choose the fields that the
//! browser adds, which the rules look at, and it cannot know a token.

use crate::log::{has_token, quoted};
use crate::refusal::{self, Refusal, ensure, shown};
use crate::request::{Request, form_fields};
use crate::words;
use std::{hint::black_box, net::IpAddr};

const PAGE_METHODS: &str = "GET, HEAD, OPTIONS";
const RUN_METHODS: &str = "GET, HEAD, POST, OPTIONS";
const LARGEST_FORM: u64 = 64 << 10;
/// Query fields by which polyfills of `EventSource` say what `Last-Event-ID` says.
const RECONNECT_FIELDS: [&[u8]; 2] = [b"lastEventId", b"evs_last_event_id"];

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

/// A command line as it was asked for, and its words, of which there is at least one.
#[derive(Debug, PartialEq)]
pub struct CommandLine {
    pub text: Vec<u8>,
    pub words: Vec<Vec<u8>>,
}

impl CommandLine {
    /// As the log has it: as it was asked for, unless quotes and backslashes could hide the token.
    pub fn logged(&self) -> String {
        let joined = self.words.join(&b' ');
        quoted(if has_token(&joined) { &joined } else { &self.text })
    }
}

/// What is to be done about a request.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Page,
    Usage,
    /// The list of what may run.
    Commands,
    /// The methods of the path.
    Methods(&'static str),
    /// Nothing: an event stream that has ended is asked for once more.
    Reconnect,
    /// The head that a run would have.
    Head,
    Run(CommandLine),
    /// To read the form that holds the command, which [`Rules::command`] judges.
    ReadForm,
}

impl Rules {
    /// Checks a request, in the order in which refusals take precedence. `local` is the address that its
    /// connection came in on.
    pub fn judge(&self, request: &Request, local: IpAddr) -> Result<Verdict, Refusal> {
        let (path, query) = request.path_and_query();
        let method = request.method.as_str();
        self.check_host(request, local)?;
        // Links to the page work.
        if path != "/" || !matches!(method, "GET" | "HEAD") {
            self.check_browser(request, path)?;
        }
        let methods = match path {
            "/" | "/commands" => PAGE_METHODS,
            "/run" => RUN_METHODS,
            _ => return Err(refusal::NO_PATH),
        };
        match (method, path) {
            ("OPTIONS", _) => return Ok(Verdict::Methods(methods)),
            ("GET" | "HEAD", _) | ("POST", "/run") => {}
            ("POST", _) => return Err(refusal::METHOD.about(methods)),
            _ => return Err(refusal::NO_METHOD.about(&shown(method.as_bytes()))),
        }
        if path == "/" {
            let is_browser = request.accepts("text/html");
            return Ok(if is_browser { Verdict::Page } else { Verdict::Usage });
        }
        self.check_token(request)?;
        if path == "/commands" {
            return Ok(Verdict::Commands);
        }
        if is_reconnect(request, query) {
            return Ok(Verdict::Reconnect);
        }
        if method == "POST" && !has_command(query) {
            check_form(request)?;
            return Ok(Verdict::ReadForm);
        }
        let command = self.command(query)?;
        Ok(if method == "HEAD" { Verdict::Head } else { Verdict::Run(command) })
    }

    /// The one `command` in a query or form, if it may run.
    pub fn command(&self, form: &[u8]) -> Result<CommandLine, Refusal> {
        let mut command = None;
        for (name, value) in form_fields(form).ok_or(refusal::ESCAPE)? {
            if name == b"command" {
                ensure(command.replace(value).is_none(), refusal::TWO)?;
            } else if !RECONNECT_FIELDS.contains(&&name[..]) {
                return Err(refusal::OTHER_FIELD.about(&shown(&name)));
            }
        }
        let text = command.ok_or(refusal::NO_COMMAND)?;
        let words = words::split(&text)?;
        let is_admitted = self.allowed.iter().any(|allowed| allowed.admits(&words));
        ensure(is_admitted || self.allowed.is_empty(), refusal::NOT_ALLOWED)?;
        Ok(CommandLine { text, words })
    }

    /// What may run, a line each, as the options have it; nothing where everything may.
    pub fn listed(&self) -> String {
        self.allowed.iter().map(|allowed| format!("{}\n", allowed.text)).collect()
    }

    /// The foreign origin whose page may read the answer, if the request comes from one.
    pub fn foreign_origin(&self, request: &Request) -> Option<String> {
        match request.values("origin")[..] {
            [origin] if !is_own(origin, request) && self.admits(origin) => Some(origin.to_string()),
            _ => None,
        }
    }

    /// Rule 1: `Host` can only mean this server. It stops DNS rebinding, where another site's name is made
    /// to resolve to this host's address.
    fn check_host(&self, request: &Request, local: IpAddr) -> Result<(), Refusal> {
        // HTTP/1.0 may have none.
        let Some(&authority) = request.values("host").first() else {
            return Ok(());
        };
        let name = host_name(authority).ok_or(refusal::HOST)?;
        let localhost = if local.is_loopback() { " or localhost" } else { "" };
        let names = format!("{local}{localhost}");
        ensure(self.token.is_some() || means_here(&name, local), refusal::MISDIRECTED.about(&names))
    }

    /// Rules 2 to 4, which tell another site's page from everybody else.
    fn check_browser(&self, request: &Request, path: &str) -> Result<(), Refusal> {
        match request.values("origin")[..] {
            [] => {}
            [origin] if is_own(origin, request) || self.admits(origin) => return Ok(()),
            [origin, ..] => return Err(refusal::ORIGIN.about(&shown(origin.as_bytes()))),
        }
        let is_guarded = matches!(path, "/run" | "/commands");
        let navigates = request.values("sec-fetch-mode").contains(&"navigate");
        ensure(!is_guarded || !navigates, refusal::LINK)?;
        let sites = request.values("sec-fetch-site");
        let is_own = sites.iter().all(|site| matches!(*site, "same-origin" | "none"));
        ensure(is_own, refusal::OTHER_SITE)?;
        let agents = request.values("user-agent");
        let is_browser = agents.iter().any(|agent| agent.starts_with("Mozilla/"));
        let is_known = !is_browser || !sites.is_empty() || self.token.is_some();
        ensure(!is_guarded || is_known, refusal::BROWSER)
    }

    /// Whether `--allow-origin` has it. The opaque origin `null` could be anybody's.
    fn admits(&self, origin: &str) -> bool {
        let is_origin =
            origin.contains("://") && origin.bytes().all(|byte| byte.is_ascii_graphic());
        is_origin && self.origins.iter().any(|listed| listed == origin || listed == "*")
    }

    /// The bearer token (RFC 6750 section 2.1).
    fn check_token(&self, request: &Request) -> Result<(), Refusal> {
        let Some(token) = &self.token else {
            return Ok(());
        };
        // Two of them are no token: what they make together has a blank in it.
        let credentials = request.values("authorization").join(" ");
        let (scheme, given) = credentials.split_once(' ').unwrap_or_default();
        let is_same = equals_in_constant_time(token, given.trim_start_matches(' '));
        ensure(is_same && scheme.eq_ignore_ascii_case("bearer"), refusal::TOKEN)
    }
}

impl Allowed {
    /// Reads the text of an `--allow`: a command line, and where the text ends in a blank and a bare `*`, one
    /// with any further arguments. A star that is quoted is one, as is one that is all there is.
    pub fn parse(text: &str) -> Result<Allowed, Refusal> {
        let mut words = words::split(text.as_bytes())?;
        let start = text.strip_suffix(" *").or(text.strip_suffix("\t*")).unwrap_or_default();
        // The blank may belong to a word, by a quote or a backslash; then so does the star.
        let is_open =
            words::split(start.as_bytes()).is_ok_and(|start| start == words[..words.len() - 1]);
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
    let hosts = request.values("host");
    !hosts.is_empty() && origin.strip_prefix("http://") == Some(hosts[0])
}

/// Whether the request asks to go on with what has ended: the reconnect of an `EventSource` or of a polyfill,
/// or, as wget has it, the rest of an answer that broke off.
fn is_reconnect(request: &Request, query: &[u8]) -> bool {
    let mut ids = request.values("last-event-id").join("").into_bytes();
    for (name, value) in form_fields(query).unwrap_or_default() {
        if RECONNECT_FIELDS.contains(&&name[..]) {
            ids.extend(value);
        }
    }
    !ids.is_empty() || !request.values("range").is_empty()
}

/// Whether the query has anything but the fields of a reconnect, right or wrong: then the command is there.
fn has_command(query: &[u8]) -> bool {
    let Some(fields) = form_fields(query) else {
        return true;
    };
    !fields.iter().all(|(name, _)| RECONNECT_FIELDS.contains(&&name[..]))
}

/// Whether the content can be the form that holds the command.
fn check_form(request: &Request) -> Result<(), Refusal> {
    ensure(request.content_length > 0, refusal::NO_COMMAND)?;
    for value in request.values("content-type") {
        let media_type = value.split(';').next().unwrap_or_default().trim();
        let is_form = media_type.eq_ignore_ascii_case("application/x-www-form-urlencoded");
        ensure(is_form, refusal::NO_FORM.about(&shown(media_type.as_bytes())))?;
    }
    ensure(request.content_length <= LARGEST_FORM, refusal::LONG_FORM)
}

/// In a time that does not tell how much of it was right. The length of a token is no secret.
fn equals_in_constant_time(token: &str, given: &str) -> bool {
    let mut differences = 0;
    for (ours, theirs) in token.bytes().zip(given.bytes()) {
        // Behind the black box the compiler cannot see that the loop could end early.
        differences = black_box(differences | (ours ^ theirs));
    }
    differences == 0 && token.len() == given.len()
}

/// The host of `host[:port]`, lower case; none where RFC 3986 section 3.2.2 does not have it.
fn host_name(authority: &str) -> Option<String> {
    let (host, port) = match authority.rsplit_once(':') {
        // A colon inside of [ ] belongs to the address.
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (authority, ""),
    };
    let literal = in_brackets(host);
    let in_name = |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=".contains(c);
    let is_good = |c: char| in_name(c) || (literal.is_some() && c == ':');
    let text = literal.unwrap_or(host);
    let is_host = !text.is_empty() && text.chars().all(is_good);
    let is_port = port.bytes().all(|byte| byte.is_ascii_digit());
    if is_host && is_port { Some(host.to_ascii_lowercase()) } else { None }
}

/// Whole names and parsed addresses are compared, never beginnings or ends: `127.0.0.1.evil.test` is
/// somebody else's.
fn means_here(name: &str, local: IpAddr) -> bool {
    if let Ok(address) = in_brackets(name).unwrap_or(name).parse::<IpAddr>() {
        return address.to_canonical() == local;
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    local.is_loopback() && (name == "localhost" || name.ends_with(".localhost"))
}

fn in_brackets(host: &str) -> Option<&str> {
    host.strip_prefix('[')?.strip_suffix(']')
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
    fn tokens_are_equal_or_not() {
        for (given, expected) in
            [("abc", true), ("abd", false), ("ab", false), ("abcd", false), ("", false)]
        {
            assert_eq!(equals_in_constant_time("abc", given), expected, "{given}");
        }
    }

    #[test]
    fn host_names() {
        let table = [
            ("a.b:1", Some("a.b")),
            ("A", Some("a")),
            ("a:", Some("a")),
            ("[::1]", Some("[::1]")),
            ("[::1]:80", Some("[::1]")),
            ("", None),
            (":80", None),
            ("::1", None),
            ("[::1", None),
            ("[::1]x", None),
            ("[]", None),
            ("a:b", None),
            ("a b", None),
            ("a/b", None),
            ("a@b", None),
        ];
        for (authority, expected) in table {
            assert_eq!(host_name(authority).as_deref(), expected, "{authority}");
        }
    }
}
