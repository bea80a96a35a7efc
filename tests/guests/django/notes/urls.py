from django.urls import path

from . import views

urlpatterns = [
    path("", views.NoteList.as_view(), name="notes"),
    path("<int:pk>/", views.NoteDetail.as_view(), name="note"),
    path("new/", views.NoteCreate.as_view(), name="new"),
    path("count/", views.count),
    path("about/", views.about),
    path("mine/", views.mine),
    path("statistics/", views.statistics),
    path("rolled-back/", views.rolled_back),
    path("stream/", views.stream),
    path("media/<path:name>", views.media),
    path("fail/", views.fail),
]
