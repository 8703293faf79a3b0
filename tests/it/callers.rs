//! Section 2, "Who may call": rebinding, other sites' pages, the token, what is allowed.

use crate::support::*;

fn statuses(server: &Server, table: &[(&str, u16)]) {
    let port = server.address.rsplit(':').next().unwrap();
    for (fields, status) in table {
        let fields = fields.replace("HOST", &server.address).replace("PORT", port);
        let host = if fields.contains("Host:") {
            String::new()
        } else {
            format!("Host: {}\r\n", server.address)
        };
        let request = format!("GET /run?command=true HTTP/1.1\r\n{host}{fields}\r\n");
        let response = server.send(&request);
        assert_eq!(response.status, *status, "{request}{response:?}");
    }
}

#[test]
fn names_that_can_only_mean_this_server() {
    let server = Server::start(&[]);
    statuses(
        &server,
        &[
            ("Host: HOST\r\n", 200),
            ("Host: 127.0.0.1\r\n", 200),
            ("Host: 127.0.0.1:\r\n", 200),
            ("Host: 127.0.0.1:1\r\n", 200),
            ("Host: localhost:PORT\r\n", 200),
            ("Host: LocalHost.\r\n", 200),
            ("Host: a.b.localhost\r\n", 200),
            ("Host: localhost..\r\n", 421),
            ("Host: notlocalhost\r\n", 421),
            ("Host: localhost.evil.test\r\n", 421),
            ("Host: 127.0.0.1.nip.io\r\n", 421),
            ("Host: evil.test:PORT\r\n", 421),
            ("Host: 0.0.0.0:PORT\r\n", 421),
            ("Host: 127.0.0.2\r\n", 421),
            ("Host: 127.1\r\n", 421),
            ("Host: 2130706433\r\n", 421),
            ("Host: 0x7f.0.0.1\r\n", 421),
            ("Host: 127.0.0.01\r\n", 421),
            ("Host: [::1]\r\n", 421),
            ("Host: [::ffff:127.0.0.1]:PORT\r\n", 421),
            ("Host: 127.0.0.1.\r\n", 421),
        ],
    );
    // Both names of an absolute-form target count.
    for (authority, host, status) in [
        ("evil.test", "127.0.0.1", 421),
        ("127.0.0.1", "evil.test", 421),
        ("localhost", "127.0.0.1", 200),
        ("", "127.0.0.1", 400),
    ] {
        let request =
            format!("GET http://{authority}/run?command=true HTTP/1.1\r\nHost: {host}\r\n\r\n");
        assert_eq!(server.send(&request).status, status, "{request}");
    }
    assert_eq!(server.send("GET /run?command=true HTTP/1.0\r\n\r\n").status, 200);
    let page = server.send("GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n");
    assert_eq!(page.status, 421);
}

#[test]
fn names_on_ipv6() {
    let mut command = binary();
    command.args(["--listen", "[::1]:0"]);
    let server = Server::start_command(command);
    let hosts = [
        ("[::1]", 200),
        ("[0:0:0:0:0:0:0:1]:5", 200),
        ("localhost", 200),
        ("127.0.0.1", 421),
        ("[::2]", 421),
        ("::1", 400),
        ("[::1", 400),
        ("[::1]x", 400),
    ];
    for (host, status) in hosts {
        let response =
            server.send(format!("GET /run?command=true HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(response.status, status, "{host}");
    }
}

#[test]
fn other_sites_pages_are_refused() {
    let server = Server::start(&[]);
    statuses(
        &server,
        &[
            ("Origin: http://HOST\r\n", 200),
            (
                "Origin: http://HOST\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nUser-Agent: Mozilla/5.0\r\n",
                200,
            ),
            ("Origin: https://HOST\r\n", 403),
            ("Origin: HTTP://HOST\r\n", 403),
            ("Origin: http://HOST/\r\n", 403),
            ("Origin: http://localhost:PORT\r\n", 403),
            ("Host: localhost:PORT\r\nOrigin: http://localhost:PORT\r\n", 200),
            ("Origin: http://evil.test\r\n", 403),
            ("Origin: http://127.0.0.1:1\r\n", 403),
            ("Origin: null\r\n", 403),
            ("Origin:\r\n", 403),
            ("Origin: http://HOST\r\nOrigin: http://HOST\r\n", 403),
            ("Origin: http://HOST http://evil.test\r\n", 403),
            ("Sec-Fetch-Site: same-origin\r\n", 200),
            ("Sec-Fetch-Site: none\r\n", 200),
            ("Sec-Fetch-Site: same-site\r\n", 403),
            ("Sec-Fetch-Site: cross-site\r\n", 403),
            ("Sec-Fetch-Site: none\r\nSec-Fetch-Site: cross-site\r\n", 403),
            ("Sec-Fetch-Site:\r\n", 403),
            ("Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\n", 403),
            ("Sec-Fetch-Site: same-origin\r\nSec-Fetch-Mode: navigate\r\n", 403),
            (
                "Sec-Fetch-Site: same-origin\r\nSec-Fetch-Mode: cors\r\nUser-Agent: Mozilla/5.0\r\n",
                200,
            ),
            ("User-Agent: Mozilla/5.0 (X11)\r\n", 403),
            ("User-Agent: curl/8.0\r\n", 200),
            ("User-Agent: not Mozilla/5.0\r\n", 200),
        ],
    );
    let page = "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nUser-Agent: Mozilla/5.0\r\nOrigin: null\r\n";
    let page = server.get("/", page);
    assert_eq!(page.status, 200);
    assert!(
        page.field("content-security-policy")
            .is_some_and(|policy| policy.starts_with("default-src 'none'")
                && policy.contains("frame-ancestors 'none'"))
    );
    assert!(
        !page.fields.iter().any(|(name, _)| name.starts_with("access-control-") || name == "vary")
    );
    assert!(
        server.log().contains("status=403 target=\"/run?command=true\" why=\"origin not allowed\"")
    );
}

#[test]
fn an_allowed_origin_may_read() {
    let server = Server::start(&[
        "--allow-origin",
        "https://ops.example",
        "--allow-origin=http://b.example:8",
    ]);
    for origin in ["https://ops.example", "http://b.example:8"] {
        for (target, status) in [("/run?command=true", 200), ("/run", 400), ("/none", 404)] {
            let response = server.get(target, &format!("Origin: {origin}\r\n"));
            assert_eq!(
                (
                    response.status,
                    response.field("access-control-allow-origin"),
                    response.field("vary")
                ),
                (status, Some(origin), Some("Origin"))
            );
        }
        let preflight = format!(
            "OPTIONS /run HTTP/1.1\r\nHost: {}\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: POST\r\n\r\n",
            server.address
        );
        let response = server.send(preflight);
        assert_eq!(response.status, 204);
        assert_eq!(response.field("access-control-allow-methods"), Some("GET, POST"));
        assert_eq!(
            response.field("access-control-allow-headers"),
            Some("Authorization, Content-Type, Last-Event-ID")
        );
    }
    for origin in [
        "https://ops.example.evil.test",
        "http://ops.example",
        "https://ops.example:443",
        "null",
        "*",
    ] {
        let response = server.get("/run?command=true", &format!("Origin: {origin}\r\n"));
        assert_eq!(
            (response.status, response.field("access-control-allow-origin")),
            (403, None),
            "{origin}"
        );
    }
    let own = server.get("/run?command=true", &format!("Origin: http://{}\r\n", server.address));
    assert_eq!(
        (own.status, own.field("access-control-allow-origin"), own.field("vary")),
        (200, None, None)
    );
    let any = Server::start(&["--allow-origin", "*", "--no-token"]);
    assert_eq!(
        any.get("/run?command=true", "Origin: https://x.example\r\n")
            .field("access-control-allow-origin"),
        Some("https://x.example")
    );
    assert_eq!(any.get("/run?command=true", "Origin: null\r\n").status, 403);
}

#[test]
fn a_token_is_asked_for() {
    let folder = Folder::new();
    let file = folder.write("token", "s3cret-t0ken \r\nother line\n");
    let by_file = Server::start(&["--token-file", &file]);
    let mut command = binary();
    command.args(["--listen", "127.0.0.1:0"]).env("SSECOMMANDER_TOKEN", "s3cret-t0ken");
    let by_variable = Server::start_command(command);
    for server in [&by_file, &by_variable] {
        statuses(
            server,
            &[
                ("", 401),
                ("Authorization: Bearer s3cret-t0ken\r\n", 200),
                ("authorization: bearer   s3cret-t0ken\r\n", 200),
                ("Authorization: Bearer s3cret-t0keN\r\n", 401),
                ("Authorization: Bearer s3cret-t0ke\r\n", 401),
                ("Authorization: Bearer s3cret-t0kenx\r\n", 401),
                ("Authorization: Bearer\r\n", 401),
                ("Authorization: s3cret-t0ken\r\n", 401),
                ("Authorization: Basic s3cret-t0ken\r\n", 401),
                ("Authorization: Bearers3cret-t0ken\r\n", 401),
                (
                    "Authorization: Bearer s3cret-t0ken\r\nAuthorization: Bearer s3cret-t0ken\r\n",
                    401,
                ),
                // Rules 1 and 4 are skipped, 2 and 3 are not.
                ("Host: any.name\r\nAuthorization: Bearer s3cret-t0ken\r\n", 200),
                ("User-Agent: Mozilla/5.0\r\nAuthorization: Bearer s3cret-t0ken\r\n", 200),
                ("Origin: http://evil.test\r\nAuthorization: Bearer s3cret-t0ken\r\n", 403),
                (
                    "Host: any.name\r\nOrigin: http://any.name\r\nAuthorization: Bearer s3cret-t0ken\r\n",
                    200,
                ),
                ("Sec-Fetch-Site: cross-site\r\nAuthorization: Bearer s3cret-t0ken\r\n", 403),
            ],
        );
        let refused = server.get("/run?command=s3cret-t0ken", "");
        assert_eq!(refused.field("www-authenticate"), Some("Bearer"));
        assert_eq!(server.get("/", "").status, 200);
        assert_eq!(
            server
                .send(format!("OPTIONS /run HTTP/1.1\r\nHost: {}\r\n\r\n", server.address))
                .status,
            204
        );
        let bearer = "Authorization: Bearer s3cret-t0ken\r\n";
        // Not in a command's environment, and not in the log.
        assert!(
            !output(&server.get("/run?command=env", bearer).events(), "stdout")
                .contains("SSECOMMANDER")
        );
        assert_eq!(
            output(&server.get("/run?command=echo+s3cret-t0ken", bearer).events(), "stdout"),
            "s3cret-t0ken\n"
        );
        server.logged(&["command=\"echo ***\""]);
        assert!(!server.log().contains("s3cret-t0ken"));
    }
    assert_eq!(Server::start(&["--listen", "0.0.0.0:0", "--no-token"]).address[..8], *"0.0.0.0:");
}

#[test]
fn only_what_is_allowed_runs() {
    let server =
        Server::start(&["--allow", "echo 'a  b'", "--allow", "printf %s *", "--allow=true"]);
    for (command, status) in [
        ("echo 'a  b'", 200),
        ("echo \"a  b\"", 200),
        ("echo a b", 403),
        ("echo 'a  b' c", 403),
        ("echo", 403),
        ("printf %s", 200),
        ("printf %s x y", 200),
        ("printf %d 1", 403),
        ("printf", 403),
        ("true", 200),
        ("/bin/true", 403),
        ("true *", 403),
        ("sh -c true", 403),
    ] {
        assert_eq!(server.get(&run_target(command), "").status, status, "{command}");
    }
    assert_eq!(Server::start(&["--allow", "*"]).get("/run?command=true", "").status, 200);
}

#[test]
fn refusals_take_precedence_in_order() {
    let folder = Folder::new();
    let file = folder.write("token", "secret");
    let server = Server::start(&["--token-file", &file, "--allow", "true"]);
    let bearer = "Authorization: Bearer secret\r\n";
    let table = [
        // Each request is wrong in its own way and in all later ones.
        ("PUT /none?command=' HTTP/1.1", "A b\r\nContent-Length: x\r\nOrigin: null\r\n", 400),
        (
            "PUT /none?command=' HTTP/1.1",
            "Transfer-Encoding: gzip\r\nHost: b\r\nOrigin: null\r\n",
            501,
        ),
        ("PUT /none?command=' HTTP/1.1", "Host: b\r\nOrigin: null\r\n", 400),
        ("PUT /none?command=' HTTP/1.1", "Origin: null\r\n", 403),
        ("PUT /none?command=' HTTP/1.1", "", 404),
        ("PUT /run?command=' HTTP/1.1", "Last-Event-ID: 1\r\n", 501),
        ("GET /run?command=' HTTP/1.1", "Last-Event-ID: 1\r\n", 401),
        (
            "GET /run?command=' HTTP/1.1",
            "Last-Event-ID: 1\r\nAuthorization: Bearer secret\r\n",
            204,
        ),
        ("GET /run?command=' HTTP/1.1", bearer, 400),
        ("GET /run?command=false HTTP/1.1", bearer, 403),
        ("GET /run?command=true HTTP/1.1", bearer, 200),
    ];
    for (line, fields, status) in table {
        let response = server.send(format!("{line}\r\nHost: a\r\n{fields}\r\n"));
        assert_eq!(response.status, status, "{line} {fields}");
    }
}
