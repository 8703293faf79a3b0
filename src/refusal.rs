//! Every reason not to run a command, and the one place where a reason becomes a status (RFC 9110 section
//! 15) and words. Who reads the words knows what was expected, and how to get there.

use std::io::ErrorKind;

/// Why a request is refused.
#[derive(Debug, PartialEq)]
pub enum Refusal {
    /// Nobody is there to be told: the connection ended or failed, or no request has begun.
    Gone,
    /// Not by the grammar of HTTP/1: which part, and what was expected. Where the next request would begin
    /// is unknown.
    Malformed(&'static str),
    Version,
    LineTooLong,
    HeadTooLarge,
    /// The head, or then the form, did not arrive whole in time.
    Late,
    TransferEncoding,
    Expectation,
    /// `Host` may be another site's name. With what it may be.
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
    /// Content of this media type, where the command was to come from it.
    NotAForm(String),
    FormTooLarge,
    /// Something is wrong with the command: what, and what would be right.
    Command(&'static str),
    /// A query or form has this field, which is not `command`.
    OtherField(String),
    NotAllowed,
    NoProgram(String),
    /// The program is there, but cannot be run: what the system says.
    CannotRun(String, String),
    /// Nothing is wrong with the request, but there is no room for it now.
    Busy(&'static str),
}

/// The longest piece of what a client sent that it is shown again.
const LONGEST_SHOWN: usize = 200;
/// What shells have built in, or as a part of their grammar, and people therefore type.
const SHELL_WORDS: &str = " . : ! alias bg break case cd continue declare do eval exec exit export fg \
    for function history if jobs local read return select set shift source then trap type typeset ulimit \
    umask unalias unset until wait while ";

impl Refusal {
    /// The status; and in one line what is wrong, a semicolon, what was expected and how to get there. What
    /// was sent stands there for each `{}`.
    pub fn told(&self) -> (u16, String) {
        use Refusal::*;
        let (status, words) = match self {
            Gone => (0, ""),
            Malformed(words) | Command(words) => (400, *words),
            OtherField(_) => (
                400,
                "a field other than command: {}; if its & is the command's, send \
                %26, or curl --data-urlencode 'command=…'",
            ),
            Token => (401, "token missing or wrong; send the field Authorization: Bearer TOKEN"),
            Origin(origin) if origin == "null" => (403, "origin not allowed; null is nobody's own"),
            Origin(_) => (403, "origin not allowed; --allow-origin {} would admit its pages"),
            OtherSite => (403, "another site's page calls; --allow-origin would admit it"),
            Link => (403, "a link runs nothing; link to the page and fill it in: /#uptime"),
            Browser => (403, "User-Agent Mozilla/ is a browser's; send another one, or a token"),
            NotAllowed => (403, "command not allowed; GET /commands lists what is"),
            CannotRun(_, why) => return (403, format!("{}: cannot be run; {why}", self.sent())),
            NoProgram(name) => return (404, format!("{name}: no such program; {}", about(name))),
            NoSuchPath => (404, "no such path; there are /, /run and /commands"),
            Method(_) => (405, "method not for this path; it has {}"),
            Late => (408, "request did not arrive in time; head and form have 5 s each"),
            TransferEncoding => (
                411,
                "content without a length; send Content-Length instead of \
                Transfer-Encoding: curl --data-binary @- does, curl -T - does not",
            ),
            FormTooLarge => (413, "form over 64 KiB; send what is long as standard input"),
            LineTooLong => (414, "request line over 8 KiB; send a long command as a form"),
            NotAForm(_) => (
                415,
                "content is no form but {}; send the command by \
                curl --data-urlencode 'command=ls -l'",
            ),
            Expectation => (417, "Expect is not 100-continue; leave it out"),
            Misdirected(_) => {
                (421, "Host is not this address; it is {}, and with a token any name")
            }
            HeadTooLarge => (431, "head over 16 KiB or 100 fields; send fewer"),
            UnknownMethod(_) => (
                501,
                "method not implemented; instead of {} send GET, or POST: \
                curl --data-binary @FILE",
            ),
            Busy(_) => (503, "no {} to be had; try again in a moment"),
            Version => (505, "HTTP version is not 1.x; send HTTP/1.1"),
        };
        (status, words.replace("{}", self.sent()))
    }

    fn sent(&self) -> &str {
        use Refusal::*;
        match self {
            Misdirected(text) | Origin(text) | UnknownMethod(text) | NotAForm(text) => text,
            OtherField(text) | NoProgram(text) | CannotRun(text, _) => text,
            Method(text) | Busy(text) => text,
            _ => "",
        }
    }

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
            Malformed(_) | Version | LineTooLong | HeadTooLarge | Late | TransferEncoding
        )
    }
}

/// Refuses, unless it is so.
pub fn ensure(is_so: bool, refusal: Refusal) -> Result<(), Refusal> {
    if is_so { Ok(()) } else { Err(refusal) }
}

impl From<std::io::Error> for Refusal {
    /// What it means that reading a request fails.
    fn from(error: std::io::Error) -> Refusal {
        if error.kind() == ErrorKind::TimedOut { Refusal::Late } else { Refusal::Gone }
    }
}

/// Why a program may not be there that somebody expected.
fn about(name: &str) -> String {
    let reason = if SHELL_WORDS.contains(&format!(" {name} ")) {
        "it is a word of the shell's"
    } else if name.contains('/') {
        "neither it, or else the interpreter that its #! names, is there"
    } else {
        "it is not on the server's PATH"
    };
    format!("{reason}, and no shell is started: sh -c '{name} …'")
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

/// The system's words for an error, without the number that std puts behind them.
pub fn words_of(error: &std::io::Error) -> String {
    let text = error.to_string();
    let (words, _) = text.split_once(" (os error").unwrap_or((&text, ""));
    words.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_one_line_in_two_parts() {
        let name = || shown(b"a\r\nb\x1b[31m\xff");
        let refusals = [
            Refusal::Misdirected(name()),
            Refusal::Origin(name()),
            Refusal::Method("GET"),
            Refusal::UnknownMethod(name()),
            Refusal::NotAForm(name()),
            Refusal::OtherField(name()),
            Refusal::NoProgram(name()),
            Refusal::CannotRun(name(), "why".to_string()),
            Refusal::Busy("thread"),
            Refusal::TransferEncoding,
            Refusal::Token,
        ];
        for refusal in refusals {
            let (status, words) = refusal.told();
            assert!((400..600).contains(&status), "{words}");
            assert!(words.contains("; ") && !words.contains("{}"), "{words}");
            assert!(!words.chars().any(char::is_control), "{words}");
        }
    }

    #[test]
    fn words_of_the_shell_are_told_as_such() {
        let told = |name: &str| Refusal::NoProgram(name.to_string()).told().1;
        assert!(told("cd").contains("cd: no such program; it is a word of the shell's"));
        assert!(!told("nonesuch").contains("word of the shell"));
        assert!(told("/x/y").contains("interpreter"));
    }

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(shown(&[b'x'; 1000]).len(), LONGEST_SHOWN);
    }
}
