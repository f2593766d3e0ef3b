"""`python -m mq2mqtt` is the command `mq2mqtt`."""

from mq2mqtt.cli import main

main()
