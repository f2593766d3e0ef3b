"""The bridge beside any MQTT 5 broker, as an ordinary client of it (`host.type: mqtt`)."""
