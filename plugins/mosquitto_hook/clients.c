#include "clients.h"

#include <stdlib.h>
#include <string.h>

#include "machine.h"

#define FIRST_SLOTS 256u

static size_t context_slot(const struct clients *clients, const void *context)
{
	/* Contexts are some hundred bytes apart. */
	return ((uintptr_t)context >> 4) * 0x9E3779B97F4A7C15u >> 20 & (clients->slots - 1);
}

static size_t id_slot(const struct clients *clients, const char *id)
{
	uint64_t hash = 14695981039346656037u;
	for (; *id; id++)
		hash = (hash ^ (uint8_t)*id) * 1099511628211u;
	return (hash ^ hash >> 32) & (clients->slots - 1);
}

static void link_in(struct clients *clients, struct client *client)
{
	struct client **context = &clients->by_context[context_slot(clients, client->context)];
	struct client **id = &clients->by_id[id_slot(clients, client->id)];
	client->next_by_context = *context;
	*context = client;
	client->next_by_id = *id;
	*id = client;
}

/* As many chains as clients at least; false without memory, where there are none yet. */
static bool reserve(struct clients *clients)
{
	if (clients->count < clients->slots)
		return true;
	struct clients grown = *clients;
	grown.slots = clients->slots ? 2 * clients->slots : FIRST_SLOTS;
	grown.by_context = calloc(grown.slots, sizeof *grown.by_context);
	grown.by_id = calloc(grown.slots, sizeof *grown.by_id);
	if (!grown.by_context || !grown.by_id) {
		free(grown.by_context);
		free(grown.by_id);
		return clients->slots > 0;
	}
	for (size_t slot = 0; slot < clients->slots; slot++)
		for (struct client *client = clients->by_context[slot], *next; client; client = next) {
			next = client->next_by_context;
			link_in(&grown, client);
		}
	free(clients->by_context);
	free(clients->by_id);
	*clients = grown;
	return true;
}

static void free_client(struct client *client)
{
	free(client->id);
	free(client->address);
	free(client);
}

struct client *clients_add(struct clients *clients, const void *context, const char *id, const char *address,
	bool clean_session)
{
	struct client *client = reserve(clients) ? calloc(1, sizeof *client) : NULL;
	if (!client)
		return NULL;
	*client = (struct client){.context = context, .id = strdup(id), .address = strdup(address ? address : ""),
		.number = ++clients->last_number, .clean_session = clean_session};
	if (!client->id || !client->address) {
		free_client(client);
		return NULL;
	}
	link_in(clients, client);
	clients->count++;
	struct client **end = &clients->asking;
	while (*end)
		end = &(*end)->next_asking;
	*end = client;
	return client;
}

/* Takes it out of those that ask, if it is one. */
static void answered(struct clients *clients, struct client *client)
{
	struct client **at = &clients->asking;
	while (*at && *at != client)
		at = &(*at)->next_asking;
	if (*at)
		*at = client->next_asking;
	client->next_asking = NULL;
}

void clients_let_in(struct clients *clients, struct client *client)
{
	answered(clients, client);
	client->connected_us = machine_now_us();
	client->online = true;
}

struct client *clients_find(const struct clients *clients, const void *context)
{
	struct client *client = clients->slots ? clients->by_context[context_slot(clients, context)] : NULL;
	while (client && client->context != context)
		client = client->next_by_context;
	return client;
}

struct client *clients_online(const struct clients *clients, const char *id)
{
	struct client *client = clients->slots ? clients->by_id[id_slot(clients, id)] : NULL;
	while (client && !(client->online && strcmp(client->id, id) == 0))
		client = client->next_by_id;
	return client;
}

void clients_remove(struct clients *clients, struct client *client)
{
	struct client **context = &clients->by_context[context_slot(clients, client->context)];
	struct client **id = &clients->by_id[id_slot(clients, client->id)];
	answered(clients, client);
	while (*context != client)
		context = &(*context)->next_by_context;
	while (*id != client)
		id = &(*id)->next_by_id;
	*context = client->next_by_context;
	*id = client->next_by_id;
	clients->count--;
	free_client(client);
}

const struct client *clients_next(const struct clients *clients, const struct client *client)
{
	if (client && client->next_by_context)
		return client->next_by_context;
	size_t slot = client ? context_slot(clients, client->context) + 1 : 0;
	while (slot < clients->slots && !clients->by_context[slot])
		slot++;
	return slot < clients->slots ? clients->by_context[slot] : NULL;
}

void clients_free(struct clients *clients)
{
	for (size_t slot = 0; slot < clients->slots; slot++)
		for (struct client *client = clients->by_context[slot], *next; client; client = next) {
			next = client->next_by_context;
			free_client(client);
		}
	free(clients->by_context);
	free(clients->by_id);
	*clients = (struct clients){0};
}
