//! Every reason not to run a command, and the one place where a reason becomes a status (RFC 9110 section
//! 15) and words. A reader of the words knows what was expected, and how to get there.

/// Why a request is refused.
#[derive(Debug, PartialEq)]
pub enum Refusal {
    /// Not by the grammar of HTTP/1: which part, and what was expected. Where the next request would begin
    /// is unknown.
    Malformed(&'static str, &'static str),
    /// The HTTP major version is not 1.
    Version,
    LineTooLong,
    HeadTooLarge,
    /// What was read did not arrive whole in time: the head, or the form.
    Late(&'static str),
    TransferEncoding,
    Expectation,
    /// `Host` may be another site's name. With the address that is meant.
    Misdirected(String),
    /// `Origin` is this one, and not allowed.
    Origin(String),
    OtherSite,
    Link,
    Browser,
    NoSuchPath,
    /// A method that this path does not have, and those that it has.
    Method(&'static str),
    UnknownMethod(String),
    Token,
    NotAForm(String),
    FormTooLarge,
    /// Something is wrong with the command: what, and what would be right.
    Command(&'static str, &'static str),
    /// A query or form has this field, which is not `command`.
    OtherField(Vec<u8>),
    NotAllowed,
    /// There is no such program.
    NoProgram(Vec<u8>),
    /// The program is there, but cannot be run: what the system says.
    CannotRun(Vec<u8>, String),
    /// Nothing is wrong with the request, but there is no room for it now: of what.
    Busy(&'static str),
}

/// A refusal, told to somebody.
pub struct Told {
    pub status: u16,
    /// What is wrong: for the log, and the beginning of what the client gets.
    pub why: String,
    /// What was expected, and how to get there: for the client.
    pub remedy: String,
}

/// What a client can do that cannot be sure of its encoding.
const ENCODE: &str = "let curl encode it: curl -N --data-urlencode 'command=ls -l' URL/run";
/// The longest piece of what a client sent that it is shown again.
const LONGEST_SHOWN: usize = 100;
/// What shells have built in, or as a part of their grammar, and people therefore type.
const SHELL_WORDS: &str = " . : ! alias bg break case cd continue declare do eval exec exit export fg \
    for function history if jobs local read return select set shift source then trap type typeset ulimit \
    umask unalias unset until wait while ";

impl Refusal {
    /// By what exit status a shell says so (XCU 2.8.2), where a command cannot be started: 127 where there
    /// is no such program, 126 where it cannot be run.
    pub fn exit_code(&self) -> Option<i32> {
        match self {
            Refusal::NoProgram(_) => Some(127),
            Refusal::CannotRun(..) => Some(126),
            _ => None,
        }
    }

    /// Whether nothing that follows on the connection could be understood.
    pub fn ends_connection(&self) -> bool {
        use Refusal::*;
        matches!(
            self,
            Malformed(..) | Version | LineTooLong | HeadTooLarge | Late(_) | TransferEncoding
        )
    }

    /// The status and the words.
    pub fn told(&self) -> Told {
        use Refusal::*;
        match self {
            Malformed(part, expected) => told(400, format!("malformed {part}"), *expected),
            Version => told(505, "HTTP version is not 1.x", "send HTTP/1.1 or HTTP/1.0"),
            LineTooLong => told(
                414,
                "request line over 8 KiB",
                "send a long command as a form: curl -N --data-urlencode 'command=…' URL/run",
            ),
            HeadTooLarge => told(431, "head over 16 KiB or 100 fields", "send fewer fields"),
            Late(what) => told(408, *what, "it has 5 seconds to arrive whole"),
            TransferEncoding => told(
                411,
                "Transfer-Encoding is not taken",
                "content needs a Content-Length: curl --data-binary @- has one, curl -T - has none",
            ),
            Expectation => told(417, "Expect is not 100-continue", "leave the field out"),
            Misdirected(address) => told(
                421,
                "Host is not this address",
                format!("it answers to {address}; with --token-file it answers to any name"),
            ),
            Origin(origin) => told(
                403,
                "origin not allowed",
                format!("{origin} is not this server's; --allow-origin would admit its pages"),
            ),
            OtherSite => told(
                403,
                "another site's page calls (Sec-Fetch-Site)",
                "open the page of this server, or admit the other one by --allow-origin",
            ),
            Link => told(
                403,
                "a link runs nothing (Sec-Fetch-Mode)",
                "link to the page with the command filled in: /#uptime",
            ),
            Browser => told(
                403,
                "a browser without Origin and Sec-Fetch-Site (User-Agent is Mozilla/)",
                "open the page at /, send another User-Agent, or set a token",
            ),
            NoSuchPath => told(404, "no such path", "there are /, /run and /commands"),
            Method(methods) => told(405, "method not for this path", format!("it has {methods}")),
            UnknownMethod(method) => told(
                501,
                "method not implemented",
                format!("{method} is not known here; send GET or POST (curl --data-binary @FILE)"),
            ),
            Token => told(
                401,
                "token missing or wrong",
                "send it in the field Authorization: Bearer TOKEN",
            ),
            NotAForm(media_type) => told(
                415,
                "content is not a form",
                format!("{media_type} holds no command here; {ENCODE}"),
            ),
            FormTooLarge => told(
                413,
                "form over 64 KiB",
                "send what is long to the command's input: curl --data-binary @FILE URL/run?command=cat",
            ),
            Command(what, remedy) => told(400, *what, *remedy),
            OtherField(name) if name.is_empty() => told(400, "an & that is not encoded", ENCODE),
            OtherField(name) => told(
                400,
                format!("a field other than command: {}", shown(name)),
                format!("perhaps an & that is not encoded; {ENCODE}"),
            ),
            NotAllowed => told(403, "command not allowed", "/commands lists what is"),
            NoProgram(name) => {
                let name = shown(name);
                let shell = if SHELL_WORDS.contains(&format!(" {name} ")) {
                    format!(
                        "it is a word of the shell's, and no shell is started: sh -c '{name} …'"
                    )
                } else if name.contains('/') {
                    "neither it, or else the interpreter that its #! names, is there".to_string()
                } else {
                    "not on the server's PATH (no shell is started: sh -c '…')".to_string()
                };
                told(404, format!("{name}: no such program"), shell)
            }
            CannotRun(name, why) => told(403, format!("{}: cannot be run", shown(name)), why),
            Busy(what) => told(503, format!("no {what} to be had"), "try again in a moment"),
        }
    }
}

fn told(status: u16, why: impl Into<String>, remedy: impl Into<String>) -> Told {
    Told { status, why: why.into(), remedy: remedy.into() }
}

/// What a client sent, as it can be shown in a line: controls escaped, cut where it is long.
pub fn shown(bytes: &[u8]) -> String {
    let mut shown = String::new();
    for character in String::from_utf8_lossy(bytes).chars().take(LONGEST_SHOWN) {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}
