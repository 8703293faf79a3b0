//! The command line and the environment, as a `Config`; the usage text.

use crate::{listener::Address, policy::Policy, run::Limits, words};
use std::{fs, net::Ipv4Addr, time::Duration};

pub struct Config {
    pub address: Address,
    pub policy: Policy,
    pub limits: Limits,
    pub max_connections: usize,
}

/// Why the program ends before it serves: its exit status and what it says. 2 is a wrong command line, 1 something that it asks for
/// and that cannot be had, 0 that saying it was all there was to do.
pub struct Exit(pub u8, pub String);

/// The same as in Cargo.toml, which a build by rustc alone does not see.
pub const VERSION: &str = "0.1.0";
pub const TOKEN_VARIABLE: &str = "SSECOMMANDER_TOKEN";

const USAGE: &str = include_str!("usage.txt");

const FLAGS: &str = " -h --help -V --version -v --verbose --no-token ";
const YEAR: Duration = Duration::from_secs(365 * 86_400);

impl Config {
    /// Reads the arguments, without the program's name, and the token's variable.
    pub fn parse(arguments: Vec<String>, token: Option<String>) -> Result<Config, Exit> {
        let mut arguments = arguments.into_iter();
        let mut config = Config::default();
        let (mut token_file, mut no_token) = (None, false);
        while let Some(argument) = arguments.next() {
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(value.to_string())),
                _ if is_flag(&argument) => (argument.as_str(), None),
                _ => (argument.as_str(), arguments.next()),
            };
            let given = (name, value);
            let (limits, policy) = (&mut config.limits, &mut config.policy);
            match name {
                "-l" | "--listen" => config.address = get(&given, ADDRESS, Address::parse)?,
                "--allow" => policy.allowed.push(get(&given, COMMAND, command_line)?),
                "--token-file" => token_file = Some(get(&given, "a path", path)?),
                "--allow-origin" => policy.origins.push(get(&given, ORIGIN, origin)?),
                "--max-connections" => config.max_connections = get(&given, COUNT, count)?,
                "--timeout" => limits.timeout = get(&given, SECONDS, seconds)?,
                "--grace" => limits.grace = get(&given, SECONDS, seconds)?,
                "--heartbeat" => limits.heartbeat = get(&given, SOME_SECONDS, some_seconds)?,
                "--stall" => limits.stall = get(&given, SOME_SECONDS, some_seconds)?,
                _ if !is_flag(name) => return Err(usage(&["no such option:", name])),
                _ if given.1.is_some() => return Err(usage(&[name, "takes no value"])),
                "-h" | "--help" => return Err(Exit(0, USAGE.to_string())),
                "-V" | "--version" => return Err(Exit(0, format!("ssecommander {VERSION}\n"))),
                "--no-token" => no_token = true,
                _ => limits.verbose = true,
            }
        }
        config.policy.token = read_token(token_file, token)?;
        if config.policy.token.is_none() && !no_token {
            config.check_exposure()?;
        }
        Ok(config)
    }

    /// Without a token, only who is on this host may call.
    fn check_exposure(&self) -> Result<(), Exit> {
        const REMEDY: &str = "set --token-file, or say --no-token";
        if self.address.is_exposed() {
            let why = format!(
                "{} can be reached from other hosts: {REMEDY}",
                self.address.name()
            );
            return Err(Exit(1, why));
        }
        if self.policy.origins.iter().any(|origin| origin == "*") {
            let why = format!("--allow-origin * lets every web page run commands: {REMEDY}");
            return Err(Exit(1, why));
        }
        Ok(())
    }
}

impl Default for Config {
    fn default() -> Config {
        Config {
            address: Address::Tcp((Ipv4Addr::LOCALHOST, 3000).into()),
            policy: Policy::default(),
            limits: Limits {
                timeout: Duration::ZERO,
                grace: Duration::from_secs(2),
                heartbeat: Duration::from_secs(15),
                stall: Duration::from_secs(60),
                verbose: false,
            },
            max_connections: 128,
        }
    }
}

/// An option's name, and what follows it.
type Given<'a> = (&'a str, Option<String>);

/// The value after an option, as `parse` understands it; `what` is what it has to be.
fn get<T>(given: &Given, what: &str, parse: fn(&str) -> Option<T>) -> Result<T, Exit> {
    let (name, Some(value)) = given else {
        return Err(usage(&[given.0, "needs", what]));
    };
    parse(value).ok_or_else(|| usage(&[name, value, "is not", what]))
}

const COMMAND: &str = "a command line";
const COUNT: &str = "a number from 1";
const ADDRESS: &str = "an address: IP:PORT, [IPv6]:PORT, PORT or unix:PATH";
const ORIGIN: &str = "an origin as browsers send it (https://ops.example), or *";
const SECONDS: &str = "seconds, 0 to 31536000";
const SOME_SECONDS: &str = "seconds, above 0 and up to 31536000";

fn usage(words: &[&str]) -> Exit {
    let why = words.join(" ").escape_debug().to_string();
    Exit(2, why + "; see --help")
}

fn is_flag(name: &str) -> bool {
    FLAGS.contains(&format!(" {name} "))
}

fn command_line(text: &str) -> Option<Vec<Vec<u8>>> {
    let words = words::split(text.as_bytes()).ok()?;
    if words.is_empty() { None } else { Some(words) }
}

fn path(text: &str) -> Option<String> {
    Some(text.to_string())
}

fn count(text: &str) -> Option<usize> {
    text.parse().ok().filter(|&number| number > 0)
}

/// Plain decimal seconds, at most a year: no sign, no exponent. What is below a nanosecond is dropped.
fn seconds(text: &str) -> Option<Duration> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let plain =
        !text.is_empty() && text != "." && text.chars().all(|c| c.is_ascii_digit() || c == '.');
    let seconds = format!("0{whole}").parse().ok().filter(|_| plain)?;
    let nanos = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    Some(Duration::new(seconds, nanos)).filter(|&time| time <= YEAR)
}

fn some_seconds(text: &str) -> Option<Duration> {
    seconds(text).filter(|time| !time.is_zero())
}

/// `scheme://host[:port]`, as in the `Origin` field (RFC 6454 section 7), or `*`.
fn origin(text: &str) -> Option<String> {
    let (scheme, host) = text.split_once("://").unwrap_or(("", ""));
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.:[]_".contains(c);
    let good =
        !scheme.is_empty() && !host.is_empty() && (scheme.to_owned() + host).chars().all(allowed);
    (good || text == "*").then(|| text.to_string())
}

/// The token, from where it is given: visible ASCII, as it has to fit a field.
fn read_token(file: Option<String>, variable: Option<String>) -> Result<Option<String>, Exit> {
    let (source, content) = match (file, variable) {
        (None, None) => return Ok(None),
        (None, Some(token)) => (TOKEN_VARIABLE.to_string(), token),
        (Some(path), None) => {
            let cannot = |error| Exit(1, format!("--token-file {path}: {error}"));
            let content = fs::read_to_string(&path).map_err(cannot)?;
            (format!("--token-file {path}"), content)
        }
        _ => {
            return Err(usage(&[
                "--token-file and",
                TOKEN_VARIABLE,
                "are both given",
            ]));
        }
    };
    let token = content.lines().next().unwrap_or("").trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let why = "the token is empty, or not visible ASCII";
        return Err(Exit(1, format!("{source}: {why}")));
    }
    Ok(Some(token.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str], token: Option<&str>) -> Result<Config, String> {
        let arguments = line.iter().map(|argument| argument.to_string()).collect();
        let parsed = Config::parse(arguments, token.map(str::to_string));
        parsed.map_err(|Exit(status, why)| format!("{status} {why}"))
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
                        .name(),
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
