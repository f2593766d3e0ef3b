"""Who may connect, where the broker is ours to start (`mq2mqtt run`)."""

from dataclasses import dataclass

from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session

__all__ = ["AuthPlugin"]


class AuthPlugin(BaseAuthPlugin):
    """Lets every client in, or leaves the decision to the broker's other authentication plugins.

    amqtt's `AnonymousAuthPlugin` marks each session as anonymous, and amqtt removes those with their subscriptions a
    second after they disconnect, also with cleanSession=false. This one never marks a session.
    """

    @dataclass
    class Config:
        """Configuration of the plugin in amqtt's YAML."""

        allow_anonymous: bool = False
        """Let clients in that no other plugin refuses. Without it, one of the other plugins must let them in."""

    async def authenticate(self, *, session: Session) -> bool | None:  # noqa: ARG002 - amqtt's interface
        """Return `True` to let the client in, `None` for no opinion; with none but that, amqtt refuses it."""
        allowed: bool = self.config.allow_anonymous
        return True if allowed else None
