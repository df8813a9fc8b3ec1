"""Workflows whose steps run on separate hosts, with a Redis that is reached by TLS and with a password."""

from pathlib import Path

import trustme
from celery import chain
from hosts import CALL, HANDSHAKE, Redis

PASSWORD = "a-password-that-no-log-may-hold"  # noqa: S105 - of this test


class RedisWithTLS(Redis):
    #: Where this machine has the certificate of the authority.
    ca_file: Path

    @classmethod
    def command(cls, *args, **_):
        files = ["--tls-cert-file", "/tls/server.pem", "--tls-key-file", "/tls/server.key", "--tls-ca-cert-file"]
        tls = ["--port", "0", "--tls-port", "6379", *files, "/tls/ca.pem", "--tls-auth-clients", "no"]
        return super().command(*tls, "--requirepass", PASSWORD, *args)

    @classmethod
    def prefix(cls):
        return f"rediss://:{PASSWORD}@"

    @property
    def url(self):
        return f"{super().url}?ssl_cert_reqs=required&ssl_ca_certs=/tls/ca.pem"

    @property
    def host_url(self):
        return f"{super().host_url}?ssl_cert_reqs=required&ssl_ca_certs={self.ca_file}"


def test_redis_by_tls_with_a_password_is_broker_backend_and_store(network, start, tmp_path):
    authority = trustme.CA()
    ca = authority.cert_pem.bytes()

    def certificates(host):
        certificate = authority.issue_cert(host, "localhost")
        chain_of_certificates = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
        key = certificate.private_key_pem.bytes()
        return {"tls/ca.pem": ca, "tls/server.pem": chain_of_certificates, "tls/server.key": key}

    redis = network.run(RedisWithTLS, image=Redis.image(), port="6379/tcp", files=certificates)
    redis.ca_file = tmp_path / "ca.pem"
    redis.ca_file.write_bytes(ca)
    hosts = start(redis, redis, files=lambda _: {"tls/ca.pem": ca})
    a, b = hosts.add_workers("a", "b")
    rows = hosts.get(chain(hosts.step("remember", "soup", on="a"), hosts.step("recall", on="b")).apply_async())
    assert [row["worker"] for row in rows] == [a.hostname(), b.hostname()]
    assert [row["value"] for row in rows] == ["soup", "soup"]
    hosts.assert_each_session_is_ended_once(1)
    assert hosts.requests() == [*HANDSHAKE, CALL, CALL, "DELETE"]
    hosts.assert_no_log_holds([PASSWORD])
