//! Who may call, and what may run. Pure: a request and the rules in, a verdict out.
//!
//! Any page that is open in a browser can reach a server on localhost. It cannot choose the fields that the
//! browser adds, which the rules look at, and it cannot know a token.

use crate::refusal::{self, Refusal, ensure, shown};
use crate::request::{FormFields, Request, form_fields, host_of};
use crate::words;
use std::{hint::black_box, net::IpAddr};

const PAGE_METHODS: &str = "GET, HEAD, OPTIONS";
const RUN_METHODS: &str = "GET, HEAD, POST, OPTIONS";
const LARGEST_FORM: u64 = 64 << 10;

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

/// What is to be done about a request.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Page,
    /// The list of what may run.
    Commands,
    /// The methods of the path.
    Methods(&'static str),
    /// Nothing: an event stream that has ended is asked for once more.
    Reconnect,
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
        match method {
            "OPTIONS" => return Ok(Verdict::Methods(methods)),
            "POST" => ensure(path == "/run", refusal::METHOD.about(PAGE_METHODS))?,
            "GET" | "HEAD" => {}
            _ => return Err(refusal::NO_METHOD.about(&shown(method.as_bytes()))),
        }
        if path == "/" {
            return Ok(Verdict::Page);
        }
        self.check_token(request)?;
        if path == "/commands" {
            return Ok(Verdict::Commands);
        }
        let fields = form_fields(query)?;
        if is_reconnect(request, &fields) {
            return Ok(Verdict::Reconnect);
        }
        if method == "POST" && fields.iter().all(|(name, _)| is_of_reconnect(name)) {
            check_form(request)?;
            return Ok(Verdict::ReadForm);
        }
        self.command(fields).map(Verdict::Run)
    }

    /// The one `command` of a query or form, if it may run.
    pub fn command(&self, fields: FormFields) -> Result<CommandLine, Refusal> {
        let mut command = None;
        for (name, value) in fields {
            if name == "command" {
                ensure(command.replace(value).is_none(), refusal::TWO)?;
            } else if !is_of_reconnect(&name) {
                let name = format!("{:?}", shown(name.as_bytes()));
                return Err(refusal::OTHER_FIELD.about(&name));
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
    pub fn foreign_origin<'r>(&self, request: &'r Request) -> Option<&'r str> {
        let origin = request.field("origin")?;
        if self.admits(origin) && !is_own(origin, request) { Some(origin) } else { None }
    }

    /// Rule 1: `Host` can only mean this server. It stops DNS rebinding, where another site's name is made
    /// to resolve to this host's address.
    fn check_host(&self, request: &Request, local: IpAddr) -> Result<(), Refusal> {
        // HTTP/1.0 may have none.
        let Some(host) = request.field("host").and_then(host_of) else {
            return Ok(());
        };
        let is_good = self.token.is_some() || means_here(&host, local);
        ensure(is_good, refusal::MISDIRECTED.about(&local.to_string()))
    }

    /// Rules 2 to 4, which tell another site's page from everybody else.
    fn check_browser(&self, request: &Request, path: &str) -> Result<(), Refusal> {
        if let Some(origin) = request.field("origin") {
            let is_good = is_own(origin, request) || self.admits(origin);
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

    /// Whether `--allow-origin` has it. The opaque origin `null` could be anybody's.
    fn admits(&self, origin: &str) -> bool {
        let is_origin = origin.contains("://") && !origin.contains(' ');
        is_origin && self.origins.iter().any(|listed| listed == origin || listed == "*")
    }

    /// The bearer token (RFC 6750 section 2.1).
    fn check_token(&self, request: &Request) -> Result<(), Refusal> {
        let Some(token) = &self.token else {
            return Ok(());
        };
        let credentials = request.field("authorization").unwrap_or_default();
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
    let host = origin.strip_prefix("http://");
    host.is_some() && host == request.field("host")
}

/// Whether it is a field of a query by which a polyfill of `EventSource` says what `Last-Event-ID` says.
fn is_of_reconnect(name: &str) -> bool {
    matches!(name, "lastEventId" | "evs_last_event_id")
}

/// Whether the request asks to go on with what has ended: the reconnect of an `EventSource` or of a polyfill,
/// or, as wget has it, the rest of an answer that broke off.
fn is_reconnect(request: &Request, query: &FormFields) -> bool {
    let has_id = request.field("last-event-id").is_some_and(|id| !id.is_empty());
    let has_polyfill_s = query.iter().any(|(name, id)| is_of_reconnect(name) && !id.is_empty());
    has_id || has_polyfill_s || request.field("range").is_some()
}

/// Whether the content can be the form that holds the command.
fn check_form(request: &Request) -> Result<(), Refusal> {
    ensure(request.content_length > 0, refusal::NO_COMMAND)?;
    if let Some(value) = request.field("content-type") {
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

/// Whole names and parsed addresses are compared, never beginnings or ends: `127.0.0.1.evil.test` is
/// somebody else's.
fn means_here(host: &str, local: IpAddr) -> bool {
    if let Ok(address) = host.parse::<IpAddr>() {
        return address.to_canonical() == local;
    }
    let name = host.strip_suffix('.').unwrap_or(host);
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
    fn tokens_are_equal_or_not() {
        for (given, expected) in
            [("abc", true), ("abd", false), ("ab", false), ("abcd", false), ("", false)]
        {
            assert_eq!(equals_in_constant_time("abc", given), expected, "{given}");
        }
    }
}
