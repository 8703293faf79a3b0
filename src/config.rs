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

const YEAR: Duration = Duration::from_secs(365 * 86_400);

type Result<T> = std::result::Result<T, Exit>;
/// What an option's value is, or what it has to be.
type Parsed<T> = std::result::Result<T, &'static str>;

impl Config {
    /// Reads the arguments, without the program's name, and the token's variable.
    pub fn parse(mut args: impl Iterator<Item = String>, token: Option<String>) -> Result<Config> {
        let mut config = Config {
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
        };
        let (limits, policy) = (&mut config.limits, &mut config.policy);
        let (mut token_file, mut no_token) = (None, false);
        while let Some(argument) = args.next() {
            let (name, mut value) = match argument.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(value.to_string())),
                _ => (argument.as_str(), None),
            };
            let mut given = || (name, value.take().or_else(|| args.next()));
            match name {
                "-l" | "--listen" => config.address = parse(given(), Address::parse)?,
                "--allow" => policy.allowed.push(parse(given(), command_line)?),
                "--token-file" => token_file = Some(parse(given(), file)?),
                "--allow-origin" => policy.origins.push(parse(given(), origin)?),
                "--max-connections" => config.max_connections = parse(given(), count)?,
                "--timeout" => limits.timeout = parse(given(), seconds)?,
                "--grace" => limits.grace = parse(given(), seconds)?,
                "--heartbeat" => limits.heartbeat = parse(given(), some_seconds)?,
                "--stall" => limits.stall = parse(given(), some_seconds)?,
                _ if value.is_some() => return Err(wrong(format!("no {name} with a value"))),
                "-h" | "--help" => return Err(Exit(0, USAGE.to_string())),
                "-V" | "--version" => return Err(Exit(0, format!("ssecommander {VERSION}\n"))),
                "--no-token" => no_token = true,
                "-v" | "--verbose" => limits.verbose = true,
                _ => return Err(wrong(format!("no option {name}"))),
            }
        }
        policy.token = read_token(token_file, token)?;
        // Without a token, only who is on this host may call.
        let danger = match policy.token.is_none() && !no_token {
            true if config.address.is_exposed() => format!("exposed at {}", config.address),
            true if policy.origins.iter().any(|it| it == "*") => "--allow-origin *".to_string(),
            _ => return Ok(config),
        };
        let why = format!("{danger} needs --token-file, or --no-token if anybody may run anything");
        Err(Exit(1, why))
    }
}

fn parse<T>(given: (&str, Option<String>), parse: fn(&str) -> Parsed<T>) -> Result<T> {
    let (name, value) = (given.0, given.1.unwrap_or_default());
    parse(&value).map_err(|what| wrong(format!("{name} needs {what}, not '{value}'")))
}

fn wrong(why: String) -> Exit {
    let why = why.escape_default().to_string().replace("\\'", "'");
    Exit(2, why + "; see --help")
}

fn file(path: &str) -> Parsed<String> {
    let path = Some(path.to_string()).filter(|it| !it.is_empty());
    path.ok_or("a file")
}

fn command_line(text: &str) -> Parsed<Vec<Vec<u8>>> {
    let words = words::split(text.as_bytes()).unwrap_or_default();
    let words = Some(words).filter(|it| !it.is_empty());
    words.ok_or("a command line")
}

fn count(text: &str) -> Parsed<usize> {
    let number = text.parse().ok().filter(|&number| number > 0);
    number.ok_or("a number from 1")
}

/// Plain decimal seconds, at most a year: no sign, no exponent. What is below a nanosecond is dropped.
fn seconds(text: &str) -> Parsed<Duration> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = whole.to_string() + fraction;
    let is_plain = !digits.is_empty() && digits.bytes().all(|it| it.is_ascii_digit());
    let nanos = format!("{whole}{fraction:0<9.9}").parse().ok();
    let time = nanos.filter(|_| is_plain).map(Duration::from_nanos);
    let time = time.filter(|time| *time <= YEAR);
    time.ok_or("seconds, 0 to 31536000")
}

fn some_seconds(text: &str) -> Parsed<Duration> {
    let time = seconds(text).ok().filter(|time| !time.is_zero());
    time.ok_or("seconds, above 0 and up to 31536000")
}

/// `scheme://host[:port]`, as in the `Origin` field (RFC 6454 section 7), or `*`.
fn origin(text: &str) -> Parsed<String> {
    let is_good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.:[]_".contains(c);
    let is_part = |part: &str| !part.is_empty() && part.chars().all(is_good);
    match text.split_once("://") {
        Some((scheme, host)) if is_part(scheme) && is_part(host) => Ok(text.to_string()),
        None if text == "*" => Ok(text.to_string()),
        _ => Err("an origin as browsers send it (https://ops.example), or *"),
    }
}

/// The token, from where it is given: visible ASCII, as it has to fit a field.
fn read_token(file: Option<String>, variable: Option<String>) -> Result<Option<String>> {
    let (source, content) = match (file, variable) {
        (None, None) => return Ok(None),
        (None, Some(token)) => (TOKEN_VARIABLE.to_string(), Ok(token)),
        (Some(path), None) => (format!("--token-file {path}"), fs::read_to_string(&path)),
        _ => return Err(wrong(format!("--token-file beside {TOKEN_VARIABLE}"))),
    };
    let cannot = |why: &str| Exit(1, format!("{source}: {why}"));
    let content = content.map_err(|error| cannot(&error.to_string()))?;
    let token = content.lines().next().unwrap_or("").trim();
    match !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(Some(token.to_string())),
        false => Err(cannot("the token is empty, or not visible ASCII")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str], token: Option<&str>) -> std::result::Result<Config, String> {
        let arguments = line.iter().map(|argument| argument.to_string());
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
            (&["--token-file"], "--token-file"),
            (&["--no-token=1"], "--no-token"),
            (&["--help=1"], "--help"),
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
