//! The command line and the environment, as a `Config`; the usage text.

use crate::listener::Address;
use crate::policy::Policy;
use crate::run::Limits;
use crate::words;
use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

pub struct Config {
    pub address: Address,
    pub policy: Policy,
    pub limits: Limits,
    pub max_connections: usize,
}

/// What a command line asks for.
pub enum Invocation {
    Serve(Config),
    Help,
    Version,
}

/// Why the program does not start, in one line.
pub enum Problem {
    /// The command line is wrong.
    Usage(String),
    /// What it asks for cannot be had.
    Start(String),
}

/// The same as in Cargo.toml, which a build by rustc alone does not see.
pub const VERSION: &str = "0.1.0";
pub const TOKEN_VARIABLE: &str = "SSECOMMANDER_TOKEN";

pub const USAGE: &str = "\
Run commands over HTTP and stream their output as Server-Sent Events.

Usage: ssecommander [OPTIONS]

  -l, --listen ADDR        IP:PORT, [IPv6]:PORT, PORT (on 127.0.0.1) or unix:PATH
                           [default: 127.0.0.1:3000; port 0 takes a free one]
      --allow COMMAND      run only this command line, word for word; a last word *
                           admits any further arguments. Repeatable [default: any]
      --token-file PATH    every request to /run must bear the token, the file's first
                           line; so does the variable SSECOMMANDER_TOKEN
      --no-token           listen beyond loopback without a token
      --allow-origin ORIGIN
                           a web origin (https://ops.example) whose pages may call.
                           Repeatable; * is any, and needs a token
      --max-connections N  connections served at once [default: 128]
      --timeout SECS       longest life of a command [default: 0, none]
      --grace SECS         between SIGTERM and SIGKILL [default: 2]
      --heartbeat SECS     silence on a stream before a comment is sent [default: 15]
      --stall SECS         longest wait for a client that does not read [default: 60]
  -v, --verbose            log every piece of output too
  -h, --help               print this
  -V, --version            print the version

  curl -N 'http://127.0.0.1:3000/run?command=ls+-l'
  curl -N -d 'command=df -h' http://127.0.0.1:3000/run
  curl -N -H 'Accept: text/plain' 'http://127.0.0.1:3000/run?command=uptime'

Events: start, stdout, stderr, err, exit (the last one). When the client goes away,
the command and all it started are killed. No shell is started: say sh -c '...' for
one. This is remote command execution by design, without TLS.
";

const LONGEST_TIME: f64 = 365.0 * 86_400.0;

impl Config {
    /// Reads the arguments, without the program's name, and the token's variable.
    pub fn parse(
        arguments: impl Iterator<Item = OsString>,
        token: Option<OsString>,
    ) -> Result<Invocation, Problem> {
        let mut arguments = arguments.map(OsString::into_vec);
        let mut config = Config {
            address: Address::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 3000))),
            policy: Policy::default(),
            limits: Limits {
                timeout: None,
                grace: Duration::from_secs(2),
                heartbeat: Duration::from_secs(15),
                stall: Duration::from_secs(60),
                verbose: false,
            },
            max_connections: 128,
        };
        let (mut token_file, mut no_token) = (None, false);
        while let Some(argument) = arguments.next() {
            let (name, mut inline) = split_option(&argument);
            let is_flag = matches!(
                &name[..],
                "--no-token" | "-v" | "--verbose" | "-h" | "--help" | "-V" | "--version"
            );
            if is_flag && inline.is_some() {
                return Err(usage(&format!("{name} takes no value")));
            }
            let mut value = |what| {
                let value = inline.take().or_else(|| arguments.next());
                value.ok_or_else(|| usage(&format!("{name} needs {what}")))
            };
            match &name[..] {
                "-h" | "--help" => return Ok(Invocation::Help),
                "-V" | "--version" => return Ok(Invocation::Version),
                "-v" | "--verbose" => config.limits.verbose = true,
                "--no-token" => no_token = true,
                "-l" | "--listen" => {
                    const WHAT: &str = "an address: IP:PORT, [IPv6]:PORT, PORT or unix:PATH";
                    let value = value(WHAT)?;
                    config.address =
                        Address::parse(&value).ok_or_else(|| wrong(&name, &value, WHAT))?;
                }
                "--allow" => {
                    let value = value("a command line")?;
                    let words = words::split(&value).map_err(|why| wrong(&name, &value, why))?;
                    if words.is_empty() {
                        return Err(wrong(&name, &value, "a command line"));
                    }
                    config.policy.allowed.push(words);
                }
                "--token-file" => token_file = Some(value("a path")?),
                "--allow-origin" => {
                    const WHAT: &str = "an origin as browsers send it: https://ops.example, or *";
                    let value = value(WHAT)?;
                    let origin = String::from_utf8(value.clone())
                        .ok()
                        .filter(|origin| is_origin(origin));
                    config
                        .policy
                        .origins
                        .push(origin.ok_or_else(|| wrong(&name, &value, WHAT))?);
                }
                "--max-connections" => {
                    const WHAT: &str = "a number from 1";
                    let value = value(WHAT)?;
                    let number = text(&value).parse().ok().filter(|&number| number > 0);
                    config.max_connections = number.ok_or_else(|| wrong(&name, &value, WHAT))?;
                }
                "--timeout" | "--grace" | "--heartbeat" | "--stall" => {
                    let zero_allowed = matches!(&name[..], "--timeout" | "--grace");
                    let what = if zero_allowed {
                        "seconds, 0 to 31536000"
                    } else {
                        "seconds, above 0, to 31536000"
                    };
                    let value = value(what)?;
                    let time =
                        seconds(&text(&value)).filter(|time| zero_allowed || !time.is_zero());
                    let time = time.ok_or_else(|| wrong(&name, &value, what))?;
                    match &name[..] {
                        "--timeout" => {
                            config.limits.timeout = Some(time).filter(|time| !time.is_zero())
                        }
                        "--grace" => config.limits.grace = time,
                        "--heartbeat" => config.limits.heartbeat = time,
                        _ => config.limits.stall = time,
                    }
                }
                _ => {
                    return Err(usage(&format!(
                        "unknown option or argument {:?}",
                        text(&argument)
                    )));
                }
            }
        }
        config.policy.token = read_token(token_file, token)?;
        config.check_exposure(no_token)?;
        Ok(Invocation::Serve(config))
    }

    fn check_exposure(&self, no_token: bool) -> Result<(), Problem> {
        if no_token || self.policy.token.is_some() {
            return Ok(());
        }
        if self.address.is_exposed() {
            let why = "is reachable from other hosts: set --token-file, or say --no-token";
            return Err(Problem::Start(format!("{} {why}", self.address)));
        }
        if self.policy.origins.iter().any(|origin| origin == "*") {
            let why = "--allow-origin * lets every web page run commands: set --token-file, or say --no-token";
            return Err(Problem::Start(why.to_string()));
        }
        Ok(())
    }
}

fn usage(why: &str) -> Problem {
    Problem::Usage(format!("{why}; see --help"))
}

fn wrong(name: &str, value: &[u8], what: &str) -> Problem {
    usage(&format!("{name} {:?}: expected {what}", text(value)))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `--name=VALUE` apart.
fn split_option(argument: &[u8]) -> (String, Option<Vec<u8>>) {
    match argument.iter().position(|&byte| byte == b'=') {
        Some(at) if argument.starts_with(b"--") => {
            (text(&argument[..at]), Some(argument[at + 1..].to_vec()))
        }
        _ => (text(argument), None),
    }
}

/// Plain decimal seconds: no sign, no exponent.
fn seconds(text: &str) -> Option<Duration> {
    let plain = text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.');
    let seconds: f64 = text.parse().ok().filter(|_| plain)?;
    (seconds <= LONGEST_TIME).then(|| Duration::from_secs_f64(seconds))
}

/// `scheme://host[:port]`, as in the `Origin` field (RFC 6454 section 7), or `*`.
fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else {
        return text == "*";
    };
    let scheme_is_good = scheme.starts_with(|first: char| first.is_ascii_lowercase())
        && scheme.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte)
        });
    let in_host = |byte: u8| {
        byte.is_ascii_graphic() && !byte.is_ascii_uppercase() && !b"/?#@\\,*".contains(&byte)
    };
    scheme_is_good && !host.is_empty() && host.bytes().all(in_host)
}

/// The token, from where it is given: visible ASCII, as it has to fit a field.
fn read_token(
    file: Option<Vec<u8>>,
    variable: Option<OsString>,
) -> Result<Option<String>, Problem> {
    let (source, content) = match (file, variable) {
        (Some(_), Some(_)) => {
            return Err(usage(&format!(
                "--token-file and {TOKEN_VARIABLE} are both given"
            )));
        }
        (None, None) => return Ok(None),
        (None, Some(variable)) => (TOKEN_VARIABLE.to_string(), variable.into_vec()),
        (Some(path), None) => {
            let source = format!("--token-file {:?}", text(&path));
            let content = fs::read(std::ffi::OsStr::from_bytes(&path));
            let content = content.map_err(|error| Problem::Start(format!("{source}: {error}")))?;
            (source, content)
        }
    };
    let token = content
        .split(|&byte| byte == b'\n')
        .next()
        .unwrap_or_default()
        .trim_ascii();
    match std::str::from_utf8(token) {
        Ok(token) if !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Ok(Some(token.to_string()))
        }
        _ if token.is_empty() => Err(Problem::Start(format!("{source}: the token is empty"))),
        _ => Err(Problem::Start(format!(
            "{source}: the token must be visible ASCII without blanks"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str], token: Option<&str>) -> Result<Config, String> {
        match Config::parse(line.iter().map(OsString::from), token.map(OsString::from)) {
            Ok(Invocation::Serve(config)) => Ok(config),
            Ok(_) => Err("help or version".to_string()),
            Err(Problem::Usage(why)) => Err(format!("2 {why}")),
            Err(Problem::Start(why)) => Err(format!("1 {why}")),
        }
    }

    #[test]
    fn the_version_is_the_package_s() {
        assert_eq!(VERSION, env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn addresses() {
        let table = [
            ("8080", "http://127.0.0.1:8080"),
            ("0", "http://127.0.0.1:0"),
            ("127.0.0.2:1", "http://127.0.0.2:1"),
            ("[::1]:65535", "http://[::1]:65535"),
            ("unix:/run/x", "unix:/run/x"),
        ];
        for (text, expected) in table {
            for line in [
                &["-l", text][..],
                &["--listen", text],
                &[&format!("--listen={text}")],
            ] {
                assert_eq!(
                    parse(line, None)
                        .unwrap_or_else(|why| panic!("{why}"))
                        .address
                        .to_string(),
                    expected
                );
            }
        }
        for text in [
            "",
            "65536",
            "-1",
            "x",
            "127.0.0.1",
            "127.1:80",
            "::1:80",
            "[::1]",
            "localhost:80",
            "unix:",
            "[127.0.0.1]:1",
        ] {
            assert!(
                parse(&["--listen", text], None).is_err_and(|why| why.starts_with("2 ")),
                "{text}"
            );
        }
    }

    #[test]
    fn seconds_are_plain_decimals() {
        let table = [
            ("0.5", 500),
            ("1", 1000),
            ("31536000", 31_536_000_000),
            (".25", 250),
            ("3.", 3000),
        ];
        for (text, millis) in table {
            let config = parse(&["--stall", text], None).unwrap_or_else(|why| panic!("{why}"));
            assert_eq!(config.limits.stall, Duration::from_millis(millis));
        }
        for text in [
            "", "-1", "+1", "1e3", "inf", "NaN", "31536001", "1s", "0x1", ".", "1.2.3", " 1",
        ] {
            for option in ["--timeout", "--grace", "--heartbeat", "--stall"] {
                assert!(
                    parse(&[option, text], None).is_err_and(|why| why.starts_with("2 ")),
                    "{option} {text}"
                );
            }
        }
        for (option, good) in [
            ("--timeout", true),
            ("--grace", true),
            ("--heartbeat", false),
            ("--stall", false),
        ] {
            assert_eq!(parse(&[option, "0"], None).is_ok(), good, "{option}");
        }
    }

    #[test]
    fn wrong_options_are_named() {
        let table: &[(&[&str], &str)] = &[
            (&["--nope"], "--nope"),
            (&["run"], "run"),
            (&["--listen"], "--listen"),
            (&["--verbose=1"], "--verbose"),
            (&["--max-connections", "0"], "--max-connections"),
            (&["--max-connections", "-1"], "--max-connections"),
            (&["--allow", "a 'b"], "--allow"),
            (&["--allow", " "], "--allow"),
            (&["--allow-origin", "ops.example"], "--allow-origin"),
            (
                &["--allow-origin", "https://ops.example/"],
                "--allow-origin",
            ),
            (&["--allow-origin", "null"], "--allow-origin"),
            (&["--listen=a\nb"], "--listen"),
        ];
        for (line, name) in table {
            let why = parse(line, None).err().unwrap_or_default();
            assert!(
                why.starts_with("2 ") && why.contains(name) && !why.contains('\n'),
                "{line:?}: {why}"
            );
        }
    }

    #[test]
    fn exposure_needs_a_token() {
        for address in [
            "0.0.0.0:1",
            "192.0.2.1:1",
            "[::]:1",
            "[2001:db8::1]:1",
            "[::ffff:192.0.2.1]:1",
        ] {
            assert!(
                parse(&["-l", address], None).is_err_and(|why| why.starts_with("1 ")),
                "{address}"
            );
            assert!(parse(&["-l", address, "--no-token"], None).is_ok());
            assert!(parse(&["-l", address], Some("secret")).is_ok());
        }
        assert!(
            parse(&["-l", "127.9.9.9:1"], None).is_ok()
                && parse(&["-l", "[::ffff:127.0.0.1]:1"], None).is_ok()
        );
        assert!(parse(&["--allow-origin", "*"], None).is_err_and(|why| why.starts_with("1 ")));
        assert!(parse(&["--allow-origin=*", "--no-token"], None).is_ok());
        assert!(parse(&["--allow-origin=*"], Some("secret")).is_ok());
    }

    #[test]
    fn tokens() {
        let token =
            |text| parse(&[], Some(text)).map(|config| config.policy.token.unwrap_or_default());
        assert_eq!(token("secret"), Ok("secret".to_string()));
        assert_eq!(token("  secret \r\nrest"), Ok("secret".to_string()));
        for bad in ["", "  ", "\nsecret", "two words", "gr\u{fc}n"] {
            assert!(
                token(bad).is_err_and(|why| why.starts_with("1 ")),
                "{bad:?}"
            );
        }
        assert!(
            parse(&["--token-file", "/nonexistent"], None).is_err_and(|why| why.starts_with("1 "))
        );
        assert!(
            parse(&["--token-file", "/nonexistent"], Some("secret"))
                .is_err_and(|why| why.starts_with("2 "))
        );
    }
}
