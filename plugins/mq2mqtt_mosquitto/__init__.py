"""The bridge beside Mosquitto: a process that reads the lanes its hook writes, and speaks to it over MQTT."""
