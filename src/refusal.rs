//! Every reason not to run a command, and the one place where a reason becomes a status (RFC 9110
//! section 15) and a text. Who reads the text knows what was expected, and how to get there.

use std::{borrow::Cow, io::Error, io::ErrorKind};

/// Why a request is refused: mostly one of the constants below.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    pub status: u16,
    /// In one line what is wrong, a semicolon, what was expected and how to get there.
    pub text: Cow<'static, str>,
}

/// `{}` in the text is for [`Refusal::about`].
const fn refuse(status: u16, text: &'static str) -> Refusal {
    Refusal { status, text: Cow::Borrowed(text) }
}

/// Nobody is there to be told: the connection ended or failed.
pub const GONE: Refusal = refuse(0, "");

pub const LINE: Refusal = refuse(400, "malformed request line; send METHOD /path HTTP/1.1");
pub const LINE_END: Refusal = refuse(400, "bare CR or LF; end each line of the head with CRLF");
pub const FIELD: Refusal = refuse(400, "malformed field; send Name: value");
pub const CUT: Refusal = refuse(400, "request breaks off; send all of it");
pub const LENGTH: Refusal = refuse(400, "malformed Content-Length; send one number of bytes");
pub const HOST: Refusal = refuse(400, "no good Host; send one NAME, NAME:PORT or [IPv6]:PORT");
pub const ESCAPE: Refusal = refuse(400, "malformed percent-escape; a % itself is sent as %25");
pub const COMMAND: Refusal = refuse(400, "needs one command; curl --data-urlencode 'command=ls'");
pub const OTHER_FIELD: Refusal =
    refuse(400, "unknown field '{}'; a command with & needs curl --data-urlencode 'command=…'");
pub const NUL: Refusal = refuse(400, "command has a NUL; no argument can hold one");
pub const QUOTE: Refusal = refuse(400, "open quote in the command; close it, or put \\ before it");
pub const TOKEN: Refusal = refuse(401, "token missing or wrong; send Authorization: Bearer TOKEN");
pub const ORIGIN: Refusal = refuse(403, "origin not allowed; --allow-origin does not list {}");
pub const OTHER_SITE: Refusal = refuse(403, "another site's page; --allow-origin would admit it");
pub const LINK: Refusal = refuse(403, "a link runs nothing; link to the page instead: /#uptime");
pub const BROWSER: Refusal = refuse(403, "User-Agent is a browser's; send another one, or a token");
pub const NOT_ALLOWED: Refusal = refuse(403, "command not allowed; GET /commands lists what is");
pub const NO_PATH: Refusal = refuse(404, "no such path; there are /, /run and /commands");
pub const NOT_HERE: Refusal = refuse(405, "method not for this path; it has GET, HEAD and OPTIONS");
pub const LATE: Refusal = refuse(408, "request took too long; head and form have 5 s each");
pub const NO_LENGTH: Refusal = refuse(411, "no Content-Length; curl --data-binary @- sends one");
pub const LONG_FORM: Refusal = refuse(413, "form over 64 KiB; send what is long as standard input");
pub const LONG_LINE: Refusal = refuse(414, "request line over 8 KiB; send the command as a form");
pub const FORM: Refusal = refuse(415, "content is no form; use curl --data-urlencode 'command=ls'");
pub const EXPECT: Refusal = refuse(417, "Expect is not 100-continue; leave it out");
pub const MISDIRECTED: Refusal = refuse(421, "Host is not {}; use that address, or a token");
pub const LONG_HEAD: Refusal = refuse(431, "head over 16 KiB or 100 fields; send fewer");
pub const NO_METHOD: Refusal = refuse(501, "method not implemented; send GET, or POST with input");
pub const BUSY: Refusal = refuse(503, "no {} to be had; try again in a moment");
pub const VERSION: Refusal = refuse(505, "HTTP version is not 1.x; send HTTP/1.1");

/// The longest piece of what a client sent that it is shown again.
const LONGEST_SHOWN: usize = 200;
/// What shells have built in, or as a part of their grammar, and people therefore type.
const SHELL_WORDS: &str = " . : alias cd eval exec export for if jobs read set source type umask ";

impl Refusal {
    /// With what it is about.
    pub fn about(&self, about: &str) -> Refusal {
        Refusal { status: self.status, text: self.text.replace("{}", about).into() }
    }
}

/// There is no such program, and why not, for somebody who expected it.
pub fn no_program(name: &str) -> Refusal {
    let reason = if SHELL_WORDS.contains(&format!(" {name} ")) {
        "it is a word of the shell's"
    } else if name.contains('/') {
        "neither it, or else the interpreter that its #! names, is there"
    } else {
        "it is not on the server's PATH"
    };
    let hint = format!("{reason}, and no shell is started: sh -c '{name} …'");
    Refusal { status: 404, text: format!("{name}: no such program; {hint}").into() }
}

/// The program is there, but cannot be run.
pub fn cannot_run(name: &str, why: &str) -> Refusal {
    Refusal { status: 403, text: format!("{name}: cannot be run; {why}").into() }
}

impl From<Error> for Refusal {
    /// What it means that reading a request fails.
    fn from(error: Error) -> Refusal {
        if error.kind() == ErrorKind::TimedOut { LATE } else { GONE }
    }
}

/// Refuses, unless it is so.
pub fn ensure(is_so: bool, refusal: Refusal) -> Result<(), Refusal> {
    if is_so { Ok(()) } else { Err(refusal) }
}

/// What a client sent, as it can be shown in a line: without controls, and cut where it is long.
pub fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let as_shown = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(LONGEST_SHOWN).map(as_shown).collect()
}

/// The system's words for an error, without the number that std puts behind them.
pub fn error_text(error: &Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_one_line_in_two_parts() {
        let name = shown(b"a\r\nb\x1b[31m\xff");
        let about = [MISDIRECTED, ORIGIN, OTHER_FIELD, BUSY];
        let mut refusals: Vec<_> = about.iter().map(|refusal| refusal.about(&name)).collect();
        refusals.extend([no_program(&name), cannot_run(&name, "why"), NO_LENGTH, TOKEN, LATE]);
        for refusal in refusals {
            let text = refusal.text;
            assert!((400..600).contains(&refusal.status), "{text}");
            assert!(text.contains("; ") && !text.contains("{}"), "{text}");
            assert!(!text.chars().any(char::is_control), "{text}");
        }
    }

    #[test]
    fn words_of_the_shell_are_told_as_such() {
        assert!(no_program("cd").text.starts_with("cd: no such program; it is a word of"));
        assert!(!no_program("nonesuch").text.contains("word of the shell"));
        assert!(no_program("/x/y").text.contains("interpreter"));
    }

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(shown(&[b'x'; 1000]).len(), LONGEST_SHOWN);
    }
}
