//! Who may call, and what may run. Pure: a request and the rules in, a verdict out.
//!
//! Any page that is open in a browser can reach a server on localhost. It cannot choose the fields that the
//! browser adds, which the rules look at, and it cannot know a token.

use crate::refusal::Refusal::{self, Command};
use crate::request::{Request, form_fields};
use crate::{refusal, words};
use std::{hint::black_box, net::IpAddr};

pub const PAGE_METHODS: &str = "GET, HEAD, OPTIONS";
pub const RUN_METHODS: &str = "GET, HEAD, POST, OPTIONS";

const LARGEST_FORM: u64 = 64 << 10;
/// Fields by which polyfills of `EventSource` say in a query what `Last-Event-ID` says.
const RECONNECT_FIELDS: [&[u8]; 2] = [b"lastEventId", b"evs_last_event_id"];

const HOST: Refusal = Refusal::Malformed("Host", "send name, name:port or [IPv6]:port");
const NO_COMMAND: Refusal = Command(
    "no command",
    "send URL/run?command=ls, or by curl -N --data-urlencode 'command=ls -l' URL/run",
);
const EMPTY_COMMAND: Refusal = Command("command is empty", "name a program: command=ls");
const TWO_COMMANDS: Refusal = Command("more than one command", "send one at a time");
const ESCAPE: Refusal =
    Command("malformed percent-escape", "a % is sent as %25; curl --data-urlencode does it");

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
    /// As it was given.
    pub text: String,
    words: Vec<Vec<u8>>,
    /// Any further arguments may follow the words.
    is_open: bool,
}

/// A command line and its words, of which there is at least one.
#[derive(Debug, PartialEq)]
pub struct CommandLine {
    pub text: Vec<u8>,
    pub words: Vec<Vec<u8>>,
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
    /// To read the form that holds the command, and to judge that by [`Rules::command`].
    ReadForm,
}

impl Rules {
    /// Checks a request, in the order in which refusals take precedence. `local` is the address that its
    /// connection came in on.
    pub fn judge(&self, request: &Request, local: IpAddr) -> Result<Verdict, Refusal> {
        let (path, method) = (request.path(), request.method.as_str());
        let is_page = path == "/" && matches!(method, "GET" | "HEAD");
        self.check_host(request, local)?;
        if !is_page {
            self.check_browser(request)?;
        }
        let methods = match path {
            "/" | "/commands" => PAGE_METHODS,
            "/run" => RUN_METHODS,
            _ => return Err(Refusal::NoSuchPath),
        };
        match method {
            "OPTIONS" => return Ok(Verdict::Methods(methods)),
            "GET" | "HEAD" => {}
            "POST" if path == "/run" => {}
            "POST" => return Err(Refusal::Method(methods)),
            _ => return Err(Refusal::UnknownMethod(refusal::shown(method.as_bytes()))),
        }
        if is_page {
            let is_browser = request.accepts("text/html");
            return Ok(if is_browser { Verdict::Page } else { Verdict::Usage });
        }
        self.check_token(request)?;
        if path == "/commands" {
            return Ok(Verdict::Commands);
        }
        if is_reconnect(request) {
            return Ok(Verdict::Reconnect);
        }
        let query = request.query().as_bytes();
        if method == "POST" && !has_command(query) {
            check_form(request)?;
            return Ok(Verdict::ReadForm);
        }
        let command = self.command(query)?;
        Ok(match method {
            "HEAD" => Verdict::Head,
            _ => Verdict::Run(command),
        })
    }

    /// The one `command` in a query or form, if it may run.
    pub fn command(&self, form: &[u8]) -> Result<CommandLine, Refusal> {
        let mut command = None;
        for (name, value) in form_fields(form).ok_or(ESCAPE)? {
            if RECONNECT_FIELDS.contains(&name.as_slice()) {
                continue;
            }
            if name != b"command" {
                return Err(Refusal::OtherField(name));
            }
            if command.replace(value).is_some() {
                return Err(TWO_COMMANDS);
            }
        }
        let text = command.ok_or(NO_COMMAND)?;
        let words = words::split(&text)?;
        if words.is_empty() {
            return Err(EMPTY_COMMAND);
        }
        let is_allowed = self.allowed.iter().any(|allowed| allowed.admits(&words));
        if !is_allowed && !self.allowed.is_empty() {
            return Err(Refusal::NotAllowed);
        }
        Ok(CommandLine { text, words })
    }

    /// What may run, a line each, as the options have it; nothing where everything may.
    pub fn listed(&self) -> String {
        let mut list = String::new();
        for allowed in &self.allowed {
            list += &allowed.text;
            list.push('\n');
        }
        list
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
        let name = host_name(authority).ok_or(HOST)?;
        if self.token.is_some() || means_here(&name, local) {
            return Ok(());
        }
        let address = match local {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        };
        let localhost = if local.is_loopback() { " and to localhost" } else { "" };
        Err(Refusal::Misdirected(address + localhost))
    }

    /// Rules 2 to 4, which tell another site's page from everybody else.
    fn check_browser(&self, request: &Request) -> Result<(), Refusal> {
        match request.values("origin")[..] {
            [] => {}
            [origin] if is_own(origin, request) || self.admits(origin) => return Ok(()),
            [origin, ..] => return Err(Refusal::Origin(refusal::shown(origin.as_bytes()))),
        }
        let sites = request.values("sec-fetch-site");
        if sites.iter().any(|site| !["same-origin", "none"].contains(site)) {
            return Err(Refusal::OtherSite);
        }
        if !["/run", "/commands"].contains(&request.path()) {
            return Ok(());
        }
        if request.values("sec-fetch-mode").contains(&"navigate") {
            return Err(Refusal::Link);
        }
        let agents = request.values("user-agent");
        let is_browser = agents.iter().any(|agent| agent.starts_with("Mozilla/"));
        if is_browser && sites.is_empty() && self.token.is_none() {
            return Err(Refusal::Browser);
        }
        Ok(())
    }

    /// Whether `--allow-origin` has it. The opaque origin `null` could be anybody's.
    fn admits(&self, origin: &str) -> bool {
        let is_listed = self.origins.iter().any(|listed| listed == origin || listed == "*");
        let is_visible = origin.bytes().all(|byte| byte.is_ascii_graphic());
        is_listed && is_visible && origin.contains("://")
    }

    /// The bearer token (RFC 6750 section 2.1).
    fn check_token(&self, request: &Request) -> Result<(), Refusal> {
        let Some(token) = &self.token else {
            return Ok(());
        };
        if let [credentials] = request.values("authorization")[..] {
            let (scheme, given) = credentials.split_once(' ').unwrap_or_default();
            let is_same = equals_in_constant_time(token, given.trim_start_matches(' '));
            if is_same && scheme.eq_ignore_ascii_case("bearer") {
                return Ok(());
            }
        }
        Err(Refusal::Token)
    }
}

impl Allowed {
    /// Reads the text of an `--allow`: a command line, and where the text ends in a blank and a bare `*`, one
    /// with any further arguments. A star that is quoted is one, as is one that is all there is.
    pub fn parse(text: &str) -> Result<Allowed, Refusal> {
        let words = words::split(text.as_bytes())?;
        if words.is_empty() {
            return Err(EMPTY_COMMAND);
        }
        if let Some(start) = text.strip_suffix(" *").or(text.strip_suffix("\t*")) {
            // Where the blank belongs to a word, by a quote or a backslash, this is another word than `*`.
            let first = words::split(start.as_bytes()).unwrap_or_default();
            if words.len() == first.len() + 1 && words.starts_with(&first) && !first.is_empty() {
                return Ok(Allowed { text: text.to_string(), words: first, is_open: true });
            }
        }
        Ok(Allowed { text: text.to_string(), words, is_open: false })
    }

    fn admits(&self, words: &[Vec<u8>]) -> bool {
        if self.is_open { words.starts_with(&self.words) } else { words == self.words }
    }
}

fn is_own(origin: &str, request: &Request) -> bool {
    let host = request.values("host").first().copied();
    host.is_some() && origin.strip_prefix("http://") == host
}

/// Whether the request asks to go on with what has ended: an `EventSource`'s own reconnect, that of a
/// polyfill, or the next part of a broken answer, as wget has it.
fn is_reconnect(request: &Request) -> bool {
    let has_last_id = request.values("last-event-id").iter().any(|id| !id.is_empty());
    if has_last_id || !request.values("range").is_empty() {
        return true;
    }
    let fields = form_fields(request.query().as_bytes()).unwrap_or_default();
    let is_last_id = |(name, value): &(Vec<u8>, Vec<u8>)| {
        RECONNECT_FIELDS.contains(&&name[..]) && !value.is_empty()
    };
    fields.iter().any(is_last_id)
}

/// Whether the query is where the command is, rather than the content. Any field but those of a reconnect
/// is to be looked at there, since it is refused there.
fn has_command(query: &[u8]) -> bool {
    let fields = form_fields(query);
    fields.is_none_or(|fields| {
        let is_other = |field: &(Vec<u8>, Vec<u8>)| !RECONNECT_FIELDS.contains(&&field.0[..]);
        fields.iter().any(is_other)
    })
}

/// Whether the content can be the form that holds the command.
fn check_form(request: &Request) -> Result<(), Refusal> {
    if request.content_length == 0 {
        return Err(NO_COMMAND);
    }
    for value in request.values("content-type") {
        let (media_type, _) = value.split_once(';').unwrap_or((value, ""));
        let is_form = media_type.trim().eq_ignore_ascii_case("application/x-www-form-urlencoded");
        if !is_form {
            return Err(Refusal::NotAForm(refusal::shown(media_type.trim().as_bytes())));
        }
    }
    if request.content_length > LARGEST_FORM {
        return Err(Refusal::FormTooLarge);
    }
    Ok(())
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
        return address == local;
    }
    let name = name.strip_suffix('.').unwrap_or(name);
    local.is_loopback() && (name == "localhost" || name.ends_with(".localhost"))
}

fn in_brackets(host: &str) -> Option<&str> {
    host.strip_prefix('[')?.strip_suffix(']')
}
